"""The monitored number of a history: which one, and whether less or more of it is better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbdist.errors import PlanError, TaskError, suggest

__all__ = ["Monitor"]

_LOWER = ("loss", "error", "err", "perplexity", "mae", "mse", "rmse", "wer", "cer", "fid", "kl", "nll", "bce", "time")
_HIGHER = (
    "accuracy", "acc", "f1", "f1score", "auc", "auroc", "auprc", "ap", "map", "precision", "recall", "score", "r2",
    "bleu", "rouge", "meteor", "iou", "miou", "dice", "kappa", "mcc", "psnr", "ssim", "pearson", "spearman",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """A number of the history by which epochs are compared.

    Args:
        option: That names it, for errors.
        name: In a row of the history.
        higher: Whether more of it is better.
    """

    option: str
    name: str
    higher: bool

    @classmethod
    def of(cls, option: str, text: str, name: str, better: str | None) -> Monitor:
        """Take the user's word, "min" or "max", or else what the name says; most do. `text` is for errors.

        Raises:
            PlanError: The name does not say what is better.
        """
        words = {word for word in re.split(r"[^a-z0-9]+", name.lower()) if word}
        lower, higher = bool(words & {*_LOWER}), bool(words & {*_HIGHER})
        if better is None and lower == higher:
            raise PlanError(f"{option} {text!r} says not whether {name} is to fall or to rise: add :min or :max.")
        return cls(option=option, name=name, higher=higher if better is None else better == "max")

    @classmethod
    def parse(cls, option: str, text: str) -> Monitor:
        """Read ``NAME`` or ``NAME:min|max``.

        Raises:
            PlanError: It is something else, or must say what is better.
        """
        found = re.fullmatch(r"([^:]+)(?::(min|max))?", str(text).replace(" ", ""))
        if found is None:
            how = "write its name, as in val_loss, or NAME:max where more is better"
            raise PlanError(f"{option} {text!r} names no number of the history: {how}.")
        return cls.of(option, text, found[1], found[2])

    def value(self, row: Mapping[str, Any]) -> float:
        """The number in a row.

        Raises:
            TaskError: The row has none.
        """
        known = [name for name, value in row.items() if isinstance(value, (int, float))]
        if self.name not in known:
            raise TaskError(
                f"{self.option} looks at {self.name}, which the history has not: it has {', '.join(known)}."
                f"{suggest(self.name, known)}"
            )
        return float(row[self.name])

    def improves(self, value: float, best: float) -> bool:
        """Whether a value is better than the best one so far; NaN never is, and any other is better than NaN."""
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value > best if self.higher else value < best
