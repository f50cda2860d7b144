"""HOW one rank runs: world, channels, parameters, data, strategies, the loop. torch; never IPython or ipyparallel."""

from nbdist.core.api import train
from nbdist.core.train import Result, fit

__all__ = ["Result", "fit", "train"]
