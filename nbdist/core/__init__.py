"""HOW one rank runs: world, channels, parameters, data, strategies, the loop. torch; never IPython or ipyparallel."""

from nbdist.core.api import train
from nbdist.core.checkpoint import load_checkpoint
from nbdist.core.gather import gather
from nbdist.core.train import Result, fit

__all__ = ["Result", "fit", "gather", "load_checkpoint", "train"]
