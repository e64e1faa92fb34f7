"""What a run is: flags, folder, checkpoints, training loop, summaries, results."""
