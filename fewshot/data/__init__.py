"""Where images and tasks come from."""
