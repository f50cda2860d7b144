"""The check before the first update: whether a mesh gives what one process gives, and slices what the batch gives.

On the fewest samples that fill every slice, and before a strategy changes the model, each rank runs a step as one
process would (`plain_step.py`), and once more with weights that differ in their last bit: so far apart may results be
(`rounding.py`). It compares slices with the whole batch (`per_sample.py`). Then the mesh runs the same step
(`step_check.py`). All that a step can reach is put back (`program_state.py`).
"""
