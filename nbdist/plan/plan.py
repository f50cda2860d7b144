"""The Plan: a frozen, validated description of one run. Every option is defined here, once."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nbdist.errors import PlanError, suggest
from nbdist.plan.mesh import Mesh

__all__ = ["DEFAULT_BATCH_SIZE", "OPTIONS", "Option", "Plan"]

DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: what magics, the command line and the Python keywords know about it.

    Args:
        help: One sentence, with the unit.
        parse: Turns the word on a command line into a value.
        metavar: The placeholder shown in help.
        default: The default as a person reads it; the value itself is the Plan field's.
    """

    help: str
    parse: type = str
    metavar: str = "NAME"
    default: str | None = None


def _option(value: Any, help: str, *, parse: type = str, metavar: str = "NAME", default: str | None = None) -> Any:
    shown = str(value) if default is None and value is not None else default
    return field(default=value, metadata={"option": Option(help=help, parse=parse, metavar=metavar, default=shown)})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run. Pure data, JSON-able, checked on creation; `Plan.create` fills in what depends on the ranks.

    The sentence beside each field is the help text of the option with the same name.
    """

    mesh: Mesh
    strategy: str = _option(
        "data", "How the ranks share the work: data (alias ddp), or a mesh such as dp=2.", metavar="WORD|MESH"
    )
    loss: str = _option(
        "",
        "A callable of the notebook, or one of bce, cross_entropy, huber, kl_div, l1, mae, mse, nll, smooth_l1.",
        default="",
    )
    optimizer: str = _option(
        "adamw",
        "A callable or an optimizer of the notebook, or a class of torch.optim in small letters (sgd, adamw, ...).",
    )
    lr: float | None = _option(
        None, "Learning rate.", parse=float, metavar="RATE", default="the optimizer's own default"
    )
    epochs: int | None = _option(
        None, "Passes over the training data.", parse=int, metavar="N", default="1, unless --steps"
    )
    steps: int | None = _option(
        None, "Optimizer steps, instead of epochs; wraps round the data.", parse=int, metavar="N", default=""
    )
    batch_size: int = _option(
        DEFAULT_BATCH_SIZE, "Global batch size: samples in one optimizer step, over all ranks.", parse=int, metavar="N"
    )
    accumulate: int = _option(1, "Microbatches each rank runs in one step.", parse=int, metavar="K")
    clip_norm: float | None = _option(
        None,
        "Largest global L2 norm of the gradient; larger ones are scaled down.",
        parse=float,
        metavar="X",
        default="",
    )
    metric: str = _option(
        "", "Measured on the --val data: a callable of the notebook, or one of accuracy, mae, mse.", default=""
    )
    shuffle: bool = _option(
        True, "Read the training data in a new order each epoch.", parse=bool, metavar="yes|no", default="yes"
    )
    seed: int = _option(
        0, "Decides the order of samples and the random numbers of every slice.", parse=int, metavar="N"
    )
    threads: int = _option(
        1,
        "CPU threads of each rank; the bits of a result depend on it.",
        parse=int,
        metavar="N",
        default="cores / ranks",
    )
    bucket_mib: float = _option(
        25.0, "Gradient bucket in MiB, where the sync overlaps with backward (NCCL).", parse=float, metavar="MIB"
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if (self.epochs is None) == (self.steps is None):
            raise PlanError(f"epochs={self.epochs} and steps={self.steps}: give one of the two.")
        for name in ("batch_size", "accumulate", "threads"):
            self._at_least(name, 1)
        self._integer("seed")
        if self.shuffle not in (True, False):
            raise PlanError(f"shuffle must be True or False, not {self.shuffle!r}.")
        for name in ("lr", "clip_norm", "bucket_mib"):
            if getattr(self, name) is not None:
                self._positive(name)
        if self.batch_size < self.slices:
            raise PlanError(
                f"batch_size {self.batch_size} is smaller than its {self.slices} slices "
                f"({self.mesh.dp} ranks x {self.accumulate} microbatches): use {self.slices} or more, or fewer ranks."
            )

    @classmethod
    def create(cls, *, ranks: int, cores: int, **options: Any) -> Plan:
        """Make a Plan from options given by a person; None means not given.

        Args:
            ranks: Ranks in the world.
            cores: CPU cores of all hosts together.
            **options: Any field of Plan except `mesh`.

        Raises:
            PlanError: A value or a combination cannot be run, or an option does not exist.
        """
        for name in options:
            if name not in OPTIONS:
                raise PlanError(f"unknown option {name!r}.{suggest(name, OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        if "epochs" not in given and "steps" not in given:
            given["epochs"] = 1
        given.setdefault("threads", max(1, cores // ranks))
        mesh = Mesh.parse(given.get("strategy", "data"), ranks)
        return cls(mesh=mesh, **given)

    @property
    def slices(self) -> int:
        """Parts a full global batch is cut into: each is one forward and backward with its own random numbers."""
        return self.mesh.dp * self.accumulate

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return asdict(self)

    def _integer(self, name: str) -> int:
        value = getattr(self, name)
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise PlanError(f"{name} must be a whole number, not {value!r}.") from None
        object.__setattr__(self, name, number)
        return number

    def _at_least(self, name: str, least: int) -> None:
        if self._integer(name) < least:
            raise PlanError(f"{name} {getattr(self, name)} is too small: use {least} or more.")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise PlanError(f"{name} must be a number, not {value!r}.") from None
        if not (math.isfinite(number) and number > 0):
            raise PlanError(f"{name} {value} must be a positive number.")
        object.__setattr__(self, name, number)


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(Plan) if "option" in f.metadata}
"""Every option by its field name, in the order of help texts."""
