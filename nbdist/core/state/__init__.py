"""What survives a lost rank: snapshots, checkpoints, and the way back from both."""
