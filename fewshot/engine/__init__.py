"""How a step is run fast."""
