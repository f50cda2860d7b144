"""Commands of the user to a run, applied by all ranks after the same step."""
