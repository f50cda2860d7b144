"""Fault tolerance: snapshots in memory, checkpoints on disk, and how a training resumes from both.

Everything rests on one fact: given the state after a step, all later bits are fixed. So every failure has one remedy:
load a state that all ranks have, and train on from it.

- **What is saved.** `core/state/shard_plan.py`: each shard of weights and optimizer state, by one of the ranks that
  hold the same one, and buffers by each; `core/state/train_progress.py`: epoch, batch, step, counts, history. With the
  schedulers, the fp16 loss scale and the generators of NumPy and `random` that is all; torch's random numbers and the
  sample order are functions of the step.
- **Where.** `core/state/snapshot.py`: in *snapshot buffers*, shared memory that the notebook creates and holds, so that
  they outlive any set of ranks. A rank writes its buffers alternately, and marks a buffer with its step only when it
  is complete. Ranks are never more than a step apart, so the newest snapshot that all have completed is always there.
  All buffers of a host take twice the weights and optimizer state. If that is more than half of the free memory, no
  snapshots are taken, and the run says so: after the loss of a rank it then resumes from its last checkpoint, or
  starts over.
- **When.** `core/state/snapshotter.py`: rank 0 watches the clock (snapshots may take half a percent of the time) and
  sets a flag in the gradient sync, like *stop*; so all ranks save the state after the same step. A *checkpoint* is a
  snapshot that a thread writes to disk (`core/state/checkpoint_writer.py`); later syncs carry flags of the ranks that
  have written it. After an exception a rank saves the state after the last complete step, if nothing has changed it
  since (`core/state/step_guard.py`); of a sharded model, its shards. Where the ranks of one host, or of one ``dp``
  coordinate, hold a whole replica, they save all of it then (`core/state/replica.py`): that is enough to resume from,
  whatever happened to the others, if nothing differs from replica to replica (`core/state/first_values.py`).
- **Resuming.** A killed rank's sockets close: the others leave their collective with `PeerLostError`, a secondary
  failure, and return from `remote_calls.train`. The monitor (`cluster/runs/monitor.py`) sees that only processes were
  lost, gives their ranks to spare engines, has all ranks form a new process group (generation N+1), and calls
  `remote_calls.train` again. The ranks unpack the same payload, read the newest snapshot (`core/state/restore.py`) and
  run the same loop. Nothing of the old world is used.
- **Cells.** The `%%dist` cells and pushed values of a rank are run again on the engine that replaces it
  (`cluster/cells/replay.py`), before the next cell. A training does not wait for that: its payload holds all it needs.
- **Hangs.** Without a step for `--hang-timeout`, the monitor asks all ranks for their stacks
  (`cluster/diagnose/hangs.py`, `cluster/diagnose/where.py`) and kills the ranks that the others wait for; then they
  are lost ranks like any other. Without that option it acts only where no rank computes.
- **Scaling.** `%dist_scale N` is a command like *stop*, after which the run resumes on N ranks: they are assigned to
  engines (`Engines.resize`), the plan is made for N (`cluster/runs/replan.py`), and the run resumes from its newest
  snapshot, as after a loss. Ranks on another mesh read all ranks' shards, as from a checkpoint. `--on-failure shrink`
  is the same without a command.
- **Detached.** With `--detach` controller and engines live as long as an **anchor** (`cluster/launch/anchor_client.py`,
  `anchor_server.py`) instead of the kernel. It holds the store, all shared memory, and notes: processes, ranks, cells
  and pushed values, the run's payload. Training needs no other process. A kernel that attaches reads the notes, asks
  each engine for the run's result, a reply that comes when the run ends, and its monitor follows the run as if this
  kernel had started it (`cluster/runs/reattach.py`).
- **Giving up.** An exception of the user's code ends the run: the notebook loads the newest snapshot into its model.
  So do five deaths of processes without a new step in between.
- **Rendezvous.** While ranks form a process group, every wait also checks the store (`core/comm/rendezvous.py`);
  torch's own blocking calls run in a thread that can be abandoned. If a rank dies meanwhile, the notebook writes a key
  into the store, all ranks return with an error, and are called again (`cluster/engines/world_forming.py`). Spare
  engines (`cluster/engines/spares.py`) are started in the background after each new process group.
"""
