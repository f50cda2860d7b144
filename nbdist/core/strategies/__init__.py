"""How a plan is applied to a model: data parallel, tensor, pipeline and sharded strategies, and their meshes.

`core/strategies/mesh_parallel.py` applies a mesh in the order tp, pp, shard, dp, and writes down in the
**ParamTable** (`core/params/table.py`) where the parts of each tensor lie (`core/params/placement.py`). Sync,
clipping, update, home-coming (`table.gather_`) and checkpoints (`core/state/checkpoint_writer.py`) read that table,
and nothing else knows of the mesh.

- The model's own `nn.Parameter` objects stay: only their data change, to this rank's part, or to a **dummy** (NaN
  without memory) where it has none. So the user's optimizer, built over whole parameters, goes on working with its
  groups. One whose values are not here is a **placeholder** (`core/params/placeholder.py`): it lends itself a class
  whose every operation asks the strategy first, which gathers it (shard) or refuses
  (`core/strategies/readable_params.py`).
- Whether the optimizer may be cut is tried on small tensors, whole and in parts (`core/optim/cut_trial.py`), unless
  its class is one of torch's that are known to go by the element.
- **tp** (`core/tensor_parallel/`): single layers get another `forward`, as an attribute of the instance.
- **pp** (`core/splitting/`): the forward is recorded, measured and cut into **stages**;
  `core/strategies/pipeline/executor.py` works through a **schedule** (`core/strategies/pipeline/schedules.py`) over
  **links** (`core/comm/p2p.py`). The step of the user runs on the first stage up to its call of the model, and on
  the last one from there on.
- **shard** (`core/strategies/shard/fully_sharded.py`): **blocks** are gathered while they compute, each time into new
  memory; of that autograd keeps only where to find it again, so a view that somebody keeps stays what it is.
- **dp** is `core/sync/gradient_sync.py`, as ever, over what this rank holds.
- The ranks of one replica agree once a step on weight, stop, end of data and which parameters were used.

Under `torchrun` the walk is steps 2, 4 and 5: `core/api.py` joins torchrun's world and calls the same loop.
"""
