"""What goes beyond the original program."""
