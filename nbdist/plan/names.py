"""Well-known names that options take, for help and completion; what they stand for is in core."""

from __future__ import annotations

__all__ = ["LOSSES", "METRICS", "OPTIMIZERS"]

LOSSES = ("bce", "cross_entropy", "huber", "kl_div", "l1", "mae", "mse", "nll", "smooth_l1")
METRICS = ("accuracy", "mae", "mse")
OPTIMIZERS = (
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "muon", "nadam", "radam", "rmsprop", "rprop",
    "sgd",
)  # fmt: skip
"""Those of the tested torch; a newer one may have more, which work too."""
