"""How a plan is applied to a model: data parallel, tensor, pipeline and sharded strategies, and their meshes.

`core/strategies/mesh_parallel.py` applies a mesh in the order tp, pp, shard, dp. The first three are objects of one
interface (`core/strategies/mesh_axis.py`). Each changes the model, and records in the **ParamTable**
(`core/params/param_table.py`) which ranks hold which part of each tensor (`core/params/placement.py`). Sync, clipping,
update, the final gather (`table.gather_`) and checkpoints (`core/state/checkpoint_writer.py`) read that table and know
nothing else of the mesh.

- The model's own `nn.Parameter` objects stay. Only their data change: to this rank's part, or to a **dummy** (NaN
  without memory) if this rank has no part. So the user's optimizer, built over whole parameters, keeps its parameter
  groups. A parameter whose values are on other ranks is a **placeholder** (`core/params/placeholder.py`): its class is
  swapped for one whose every operation asks the strategy first. The strategy gathers the values (shard) or raises
  (`core/strategies/readable_params.py`).
- An optimizer may run on parts only if it is elementwise. That is known for most of torch's; any other is tried on
  small tensors, whole and in parts (`core/optim/shardability.py`).
- **tp** (`core/strategies/tensor/`): single layers get another `forward`, as an attribute of the instance.
- **pp** (`core/strategies/pipeline/`): the forward is traced, measured and cut into **stages**
  (`core/strategies/pipeline/partition/`). `executor.py` runs a **schedule** (`schedules.py`) over point-to-point
  **links** (`core/comm/p2p.py`). The first stage runs the user's step up to its call of the model, the last stage the
  rest of it.
- **shard** (`core/strategies/shard/fully_sharded.py`): **blocks** are whole while they compute: on one host in memory
  that all ranks map, else all-gathered into new memory, so a view that the user keeps stays valid. Autograd saves only
  a reference and gathers again in backward.
- **dp** is `core/sync/gradient_reducer.py`, over the parts that this rank holds.
- Once a step the ranks of one replica sum the batch weight, the control flags and which parameters were used.

Under `torchrun`, `core/api.py` joins torchrun's world and calls the same loop (steps 2, 4 and 5 of nbdist/README.md).
"""
