"""Runs: their flags, folder, checkpoints, training loop, summaries and results."""
