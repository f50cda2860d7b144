"""Commands of the user to a run, agreed by all ranks at a step boundary."""
