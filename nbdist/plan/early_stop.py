"""Early stopping: whether the last epochs have not improved on the best one, by the history alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdist.errors import PlanError, TaskError, suggest

__all__ = ["EarlyStop"]

_LOWER = ("loss", "error", "err", "perplexity", "mae", "mse", "rmse", "wer", "cer", "fid", "kl", "nll", "bce", "time")
_HIGHER = (
    "accuracy", "acc", "f1", "f1score", "auc", "auroc", "auprc", "ap", "map", "precision", "recall", "score", "r2",
    "bleu", "rouge", "meteor", "iou", "miou", "dice", "kappa", "mcc", "psnr", "ssim", "pearson", "spearman",
)  # fmt: skip
_HOW = "write NAME:EPOCHS, as in val_loss:3, or NAME:EPOCHS:max where more is better"


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When a run ends before its last epoch.

    Args:
        name: Of a number in the history.
        patience: After how many epochs without improvement.
        higher: Whether more of it is better.
    """

    name: str
    patience: int
    higher: bool

    @classmethod
    def parse(cls, text: str) -> EarlyStop:
        """Read ``NAME:EPOCHS`` or ``NAME:EPOCHS:min|max``; most names say themselves what is better.

        Raises:
            PlanError: It is something else, or must say what is better.
        """
        found = re.fullmatch(r"([^:]+):([0-9]{1,9})(?::(min|max))?", str(text).replace(" ", ""))
        if found is None or not int(found[2]):
            raise PlanError(f"early_stop {text!r} says not when: {_HOW}.")
        name, patience, better = found[1], int(found[2]), found[3]
        words = {word for word in re.split(r"[^a-z0-9]+", name.lower()) if word}
        lower, higher = bool(words & {*_LOWER}), bool(words & {*_HIGHER})
        if better is None and lower == higher:
            raise PlanError(f"early_stop {text!r} says not whether {name} is to fall or to rise: add :min or :max.")
        return cls(name=name, patience=patience, higher=higher if better is None else better == "max")

    def reason(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Why a run with this history ends now, in a clause; empty if it goes on.

        Raises:
            TaskError: The newest row has no such number.
        """
        if not history:
            return ""
        known = [name for name, value in history[-1].items() if isinstance(value, (int, float))]
        if self.name not in known:
            raise TaskError(
                f"early_stop looks at {self.name}, which the history has not: it has {', '.join(known)}."
                f"{suggest(self.name, known)}"
            )
        best, at = math.nan, 0
        for number, row in enumerate(history):
            value = float(row.get(self.name, math.nan))
            if not math.isnan(value) and (math.isnan(best) or (value > best if self.higher else value < best)):
                best, at = value, number
        if len(history) - 1 - at < self.patience:
            return ""
        epochs = f"{self.patience} epoch{'s' if self.patience > 1 else ''}"
        best_epoch = history[at].get("epoch", at + 1)
        return f"{self.name} has not improved for {epochs} on {best:.6g} of epoch {best_epoch}"
