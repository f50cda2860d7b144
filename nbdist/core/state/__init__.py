"""What survives a lost rank: snapshots, checkpoints, and the way back from both.

Everything rests on one fact: given the state after some step, what follows has fixed bits. So any failure has one
answer, to go back to a state that all ranks have, and go on.

- **What is kept.** `core/state/shard_plan.py`: each piece of weights and optimizer state by one of the ranks that
  hold it alike, and buffers by each; `core/state/progress.py`: where the rank stands, its counts, the history. With
  the scheduler, the scale of fp16 and the generators of NumPy and `random` that is all; torch's random numbers and
  the order of samples are functions of the step.
- **Where.** `core/state/snapshot.py`: in *slots* of shared memory that the notebook makes and holds, so that they
  outlive any set of ranks. A rank writes its slots in turn, and a slot says which step it holds only when it is
  complete. Ranks are never more than a step apart, so the newest snapshot that all have completed is always there.
  All slots of a host together take twice the weights and optimizer state; where that is more than half of the free
  memory none are taken, and the run says so: a rank that is lost then means to go on from the run's last checkpoint,
  or to begin anew.
- **When.** `core/state/snapshotter.py`: rank 0 watches the clock (half a percent of the time may go into snapshots)
  and asks in the gradient sync, like *stop*; so all ranks keep the state after the same step. A *checkpoint* is a
  snapshot that a thread writes to disk (`core/state/checkpoint_writer.py`); whether all have written rides on later
  syncs too. After an exception a rank keeps the *boundary*, the state after the last complete step, if nothing has
  touched it since; where a model is in parts, its part.
- **Going on.** A rank that is killed closes its sockets: the others leave their collective with `PeerLostError`, an
  echo, and come home from `entry.train`. The monitor (`cluster/runs/monitor.py`) sees that nothing but processes was
  lost, lets spares take the ranks, lets all form a world of the next *generation*, and calls `entry.train` again.
  There the ranks unpack the same payload, read the newest snapshot (`core/state/restore.py`) and run the same loop.
  Nothing of the old world is touched.
- **Definitions.** What `%%dist` cells and pushes put on a rank is told again to the engine that takes its place
  (`cluster/cells/replay.py`), before the next cell: no training waits for it, for a training brings all it needs.
- **Hangs.** Without a step for `--hang-timeout`, the monitor asks all ranks where they stand
  (`cluster/diagnose/hangs.py`, `cluster/diagnose/where.py`) and kills those that the others wait for; they are lost
  then, like any.
- **Scaled.** `%dist_scale N` is an order like *stop*, after which the monitor has other ranks take the snapshot: the
  engines are reseated (`Engines.resize`), the plan is made again for so many (`cluster/runs/replan.py`), and the run
  begins anew from its newest snapshot, as after a loss. Ranks on another mesh read what the others kept, as from a
  checkpoint. `--on-failure shrink` is the same without the order.
- **Detached.** With `--detach` controller and engines are tied to an **anchor** (`cluster/launch/anchor_client.py`,
  `anchor_server.py`) in place of the kernel. It holds the store, all shared memory, and notes: processes, ranks, what
  cells and pushes told, the run's payload. Training needs nobody else. A kernel that attaches reads the notes, asks
  each engine for the outcome of the run, an answer that comes when the run has ended, and its monitor goes on as if it
  had begun it (`cluster/runs/reattach.py`).
- **Giving up.** An exception of the user's ends the run: the notebook itself reads the newest snapshot into its
  model. A process that dies five times before the run has got any further ends it too.
- **Forming.** Ranks that meet do nothing that waits without looking at the store (`core/comm/rendezvous.py`); torch's
  own waiting is done by a thread that can be left behind. If a rank dies meanwhile, the notebook writes a word into
  the store, everybody comes back with an error, and they are called again (`cluster/engines/forming.py`). Spares
  (`cluster/engines/standby.py`) are started in the background after each world that was formed.
"""
