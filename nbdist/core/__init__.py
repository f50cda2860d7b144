"""HOW one rank trains: world, channels, parameters, data, strategies, the training loop. torch, never IPython."""

from nbdist.core.api import predict, train
from nbdist.core.params.unshard import unshard
from nbdist.core.result import Result
from nbdist.core.state.checkpoint_writer import load_checkpoint
from nbdist.core.sync.batch_gather import current_step, gather, rank, world_size
from nbdist.core.task.carried_state import carried
from nbdist.core.task.step_updates import update
from nbdist.core.train import fit

__all__ = [
    "Result", "carried", "current_step", "fit", "gather", "load_checkpoint", "predict", "rank", "train", "unshard",
    "update", "world_size",
]  # fmt: skip
