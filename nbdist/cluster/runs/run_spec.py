"""The run spec: what a run is, decided before it starts; and what another kernel needs to reattach to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbdist.cluster.runs.replan import replan
from nbdist.errors import PlanError, suggest
from nbdist.plan import Plan
from nbdist.plan.option import option, options_of
from nbdist.plan.train_options import TrainOptions

if TYPE_CHECKING:
    from nbdist.core.task.task import Task

__all__ = ["RUN_OPTIONS", "RunHandoff", "RunOptions", "RunSpec", "check_run_options"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run is.

    Args:
        run_id: Its name in the record.
        task: What is trained: model, data, step and optimizer. None once it is forgotten, and where it is sent apart.
        plan: How, on the present number of ranks.
        title: The task, for display.
        names: The user's names of model and data, for errors.
        options: Those of the plan, as the user gave them.
        cores: CPU cores of all ranks together.
        predicts: Whether it is a prediction: nothing is trained, and its result are outputs.

    The sentence beside each further field is the help text of the option with the same name.

    Raises:
        PlanError: A value is not possible.
    """

    run_id: str
    task: Task | None = field(repr=False)
    plan: Plan
    title: str
    names: tuple[str, str] = ("model", "data")
    options: dict[str, Any] = field(default_factory=dict)
    cores: int = 1
    predicts: bool = False
    hang_timeout: float | None = option(
        None, "Seconds without a step, evaluation included, after which a run counts as hanging; inf for no limit.",
        parse=float, metavar="S",
        default="a minute, or 20 times the slowest step, and only if the stacks say that no rank computes",
    )  # fmt: skip
    on_hang: str = option(
        "replace", "What to do then: replace the ranks that the others wait for, or stop.", metavar="replace|stop",
        words=("replace", "stop"),
    )  # fmt: skip
    on_failure: str = option(
        "replace", "What to do when engines are lost: replace them, shrink to the remaining ones (with the same global "
        "batch), or stop and keep the state.", metavar="replace|shrink|stop", words=("replace", "shrink", "stop"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_run_options({name: getattr(self, name) for name in RUN_OPTIONS})

    @property
    def kind(self) -> str:
        """What the user started."""
        return "prediction" if self.predicts else "rehearsal" if self.plan.rehearse else "training"

    @property
    def trains(self) -> bool:
        """Whether something of it stays: weights, a record, snapshots."""
        return self.kind == "training"

    def plan_for(self, ranks: int) -> Plan:
        """The plan on another number of ranks; it keeps what the run resumes from.

        Raises:
            PlanError: The mesh does not fit on so many ranks, the batch cannot be partitioned over them, or the slices
                that carry values would be others.
        """
        plan = replace(replan(self.options, ranks, self.cores), resume=self.plan.resume)
        if plan.carries and plan.slices != self.plan.slices:
            raise PlanError(
                f"the step carries values from batch to batch, of {self.plan.slices} slices, and on {ranks} ranks a "
                f"batch has {plan.slices}: begin with --reproducible, which cuts every batch alike on any number."
            )
        return plan


RUN_OPTIONS = options_of(RunSpec)
"""What to do when something goes wrong, by name."""


def check_run_options(options: Mapping[str, Any]) -> None:
    """Raise `PlanError` for a value among `RUN_OPTIONS` that is not possible."""
    timeout_s = options.get("hang_timeout")
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (number and timeout_s > 0):
        raise PlanError(f"a hang timeout of {timeout_s!r} is not possible: use seconds, more than 0, or inf.")
    for name in ("on_hang", "on_failure"):
        word, words = options.get(name), RUN_OPTIONS[name].words
        if name in options and word not in words:
            raise PlanError(f"unknown {name} {word!r}: use {', '.join(words)}.{suggest(str(word), words)}")


class RunOptions(TrainOptions, total=False):
    """The types of `TRAIN_OPTIONS` and `RUN_OPTIONS`, for type checkers. None is as good as not given."""

    hang_timeout: float | None
    on_hang: str | None
    on_failure: str | None


@dataclass(frozen=True, kw_only=True)
class RunHandoff:
    """What another kernel needs to reattach to a run.

    Args:
        spec: The run, without its task.
        payload: Task and plan.
        snapshot_paths: Of the ranks' snapshot buffers; see `SnapshotStore`.
        elsewhere: See `SnapshotStore.elsewhere`.
    """

    spec: RunSpec
    payload: Any
    snapshot_paths: tuple[list[str], ...] = ()
    elsewhere: dict[str, list[list[str]]] = field(default_factory=dict)
