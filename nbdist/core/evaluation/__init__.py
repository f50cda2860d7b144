"""Evaluation: the validation loss, metrics and the user's own numbers, each sample counted once; predictions' rows.

- `evaluation.py` runs the step on the validation data, or the user's ``evaluate(model, batch)`` (`own_evaluation.py`).
- A metric that is a mean over something is averaged over the slices, by the number that each mean is over. Any other
  is called once with all outputs and targets, or updated by whole batches, on the rank that gathers them
  (`sample_gather.py`): as in one process, on any number of ranks.
"""
