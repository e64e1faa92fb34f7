"""Which networks there are besides the paper's."""
