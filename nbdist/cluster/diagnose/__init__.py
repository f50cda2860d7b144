"""Where each rank stands, whether a run hangs, and what failed."""
