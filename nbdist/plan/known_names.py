"""The built-in names of losses, metrics and optimizers, for help and completion; core maps them to functions."""

from __future__ import annotations

__all__ = ["LOSSES", "METRICS", "OPTIMIZERS"]

LOSSES = ("bce", "cross_entropy", "huber", "kl_div", "l1", "mae", "mse", "nll", "smooth_l1")
METRICS = ("accuracy", "mae", "mse", "perplexity")
OPTIMIZERS = (
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "muon", "nadam", "radam", "rmsprop", "rprop",
    "sgd",
)  # fmt: skip
"""Those of the tested torch; new ones of a later torch work too."""
