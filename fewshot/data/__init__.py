"""Sources of images and tasks."""
