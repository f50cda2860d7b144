"""Learning-rate schedulers: torch's, made by the user's factory, stepped per step or per epoch, saved and resumed."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nbdist.errors import TaskError, suggest

__all__ = ["Schedulers", "check_scheduler", "load_ready", "ready_states", "scheduler_factories"]

_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}
"""Keys of a parameter group that hold a learning rate."""
_SCHEDULED = {"base_lrs", "max_lrs"}
"""Attributes of torch's schedulers that hold a rate for each group."""


class ReadyScheduler:
    """Stands for a scheduler that the user has made, where others are made by a factory.

    Args:
        scheduler: Of the user's own optimizer.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, optimizer: torch.optim.Optimizer) -> Any:
        """The scheduler itself, which was made for this optimizer, and is sent with it."""
        assert self.scheduler.optimizer is optimizer
        return self.scheduler


def ready_states(factories: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict of each ready-made scheduler among `scheduler_factories`, by name. Local."""
    return {name: one.scheduler.state_dict() for name, one in factories.items() if isinstance(one, ReadyScheduler)}


def load_ready(factories: Mapping[str, Any], states: Mapping[str, Any], *, saved: bool = False) -> None:
    """Give ready-made schedulers the states of those that were stepped, by name. Local.

    Args:
        factories: See `ready_states`.
        states: Of `ready_states`; with `saved` as in a snapshot, see `Schedulers.state_dict`.
        saved: Whether they were saved.
    """
    for name, one in factories.items():
        if isinstance(one, ReadyScheduler):
            state = states[name]
            one.scheduler.load_state_dict(_like(one.scheduler.state_dict(), state) if saved else state)


class Schedulers:
    """The torch schedulers of all optimizers: stepped after each update or epoch, a ReduceLROnPlateau after each row.

    Args:
        optimizers: Whose rates are set, by name.
        factories: Each makes the scheduler of the optimizer of that name; without one its rates are constant.
        by: After what they are stepped, a "step" or an "epoch".
    """

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        factories: Mapping[str, Callable[[torch.optim.Optimizer], Any]],
        by: str = "step",
    ) -> None:
        self._optimizers, self._by = optimizers, by
        self._schedulers = {name: make(optimizers[name]) for name, make in factories.items()}
        made = self._schedulers.values()
        self._by_row = [one for one in made if isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau)]
        others = [one for one in made if one not in self._by_row]
        self._stepped = False
        self._by_step, self._by_epoch = (others, []) if by == "step" else ([], others)

    def end_update(self) -> None:
        """Call when all optimizers have stepped. Local."""
        if not self._stepped:
            self._stepped = True
            _step_first(self._by_step)
            return
        for scheduler in self._by_step:
            scheduler.step()

    def end_epoch(self) -> None:
        """Call at the end of a pass over the data. Local."""
        _step_first(self._by_epoch)

    def end_row(self, measured: float) -> None:
        """Call at the end of a row of the history, with its measured value. Local."""
        for scheduler in self._by_row:
            scheduler.step(measured)

    def notes(self, epochs: int | None, steps: int | None, done: tuple[int, int] = (0, 0)) -> list[str]:
        """Sentences on schedulers that seem to be meant for steps, and count epochs, or the reverse. Local.

        Args:
            epochs: Of the run; None if its length is in steps.
            steps: Of the run; None if it is not known.
            done: How many epochs and steps of it are done.

        Raises:
            TaskError: One ends before the run does, and would raise then.
        """
        if steps is None:
            return []
        notes = []
        for scheduler in (part for one in (*self._by_step, *self._by_epoch) for part in _parts(one)):
            name, total = type(scheduler).__name__, getattr(scheduler, "total_steps", None)
            length, unit = (steps, "update") if self._by_step else (epochs, "epoch")
            before = getattr(scheduler, "last_epoch", 0) - done[1 if self._by_step else 0]  # in other runs
            one_cycle = isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR)
            if one_cycle and length and total and before > 0 and total < before + length:
                raise TaskError(
                    f"lr_scheduler {name} has made {before} of its {total} steps before this run, which has {length}: "
                    "make it again, with its optimizer."
                )
            if one_cycle and length and total and total < length:
                raise TaskError(
                    f"lr_scheduler {name} ends after {total} steps, and the run has {length}: it is stepped after each "
                    f"{unit}, so give total_steps={length}."
                )
            what, number = _period(scheduler)
            if epochs is None or number is None:
                continue
            if self._by_step and 1 < number <= epochs and 2 * epochs <= steps:
                notes.append(
                    f"lr_scheduler {name} has {what} {number}, as if it counted the {epochs} epochs, but it is stepped "
                    f"after each of the {steps} updates: schedule_by='epoch' (--schedule-by epoch) steps it by epochs"
                )
            elif self._by_epoch and epochs < number == steps:
                notes.append(
                    f"lr_scheduler {name} has {what} {number}, as if it counted the {steps} updates, but it is stepped "
                    f"after each of the {epochs} epochs: leave schedule_by out"
                )
        return notes

    @property
    def rate(self) -> float:
        """The first learning rate, of the first optimizer; 0 without one. Waits for its device if it is a tensor."""
        return float(self._groups[0].get("lr", 0.0))

    def set_rate(self, rate: float) -> None:
        """Set the first learning rate to `rate`, and scale all other (also future) ones by the same factor. Local."""
        groups = self._groups
        now, first = self.rate, float(groups[0].get("initial_lr", 0.0))
        if now or first:
            for group in groups:
                for key in _RATES & group.keys():
                    _scale(group, key, rate / (now or first))
            for scheduler in self._schedulers.values():
                _scale_scheduler(scheduler, rate / (now or first))
        else:
            for group in groups:
                group["lr"] = rate
        if now:
            _put(groups[0], "lr", rate)  # exactly, without the rounding of the factor

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Each scheduler's state as JSON-able data. Local.

        Raises:
            TaskError: A state holds something that JSON cannot represent.
        """
        return {
            name: {**_to_json(scheduler.state_dict()), "by": self._by} for name, scheduler in self._schedulers.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a `state_dict`; the current rates are in the optimizers' state, and not changed here. Local.

        Raises:
            TaskError: It is another scheduler's, or of one that was stepped otherwise.
        """
        for name in self._schedulers.keys() & state_dict.keys():
            by = state_dict[name].get("by", self._by)
            if by != self._by and self._schedulers[name] not in self._by_row:
                raise TaskError(
                    f"the saved lr_scheduler was stepped by {by}s, and this one is by {self._by}s: give "
                    f"schedule_by={by!r} (--schedule-by {by})."
                )
            own, state = self._schedulers[name].state_dict(), None
            with contextlib.suppress(TypeError, ValueError, KeyError):
                state = _like(own, state_dict[name])
            if not (isinstance(state, dict) and own.keys() <= state.keys()):
                raise TaskError(
                    "the saved state is of another lr_scheduler: give the same one, or none to keep the rates as they "
                    "are."
                )
            self._schedulers[name].load_state_dict(state)


def _step_first(schedulers: Sequence[Any]) -> None:
    """Step, without what torch says where it did not see the optimizer's step: resumed, or in another process."""
    if not schedulers:  # the context lets warnings that were shown once be shown again
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
        warnings.filterwarnings("ignore", r"Seems like `optimizer\.step\(\)` has been overridden")
        for scheduler in schedulers:
            scheduler.step()


def _parts(scheduler: Any) -> Iterator[Any]:
    """A torch scheduler, or those that it chains."""
    inner = getattr(scheduler, "_schedulers", ())
    if not inner:
        yield scheduler
    for part in inner:
        yield from _parts(part)


def _period(scheduler: Any) -> tuple[str, int | None]:
    """The number of steps after which a torch scheduler changes the rate for the last time, or for the first."""
    known = torch.optim.lr_scheduler
    if isinstance(scheduler, known.CosineAnnealingLR):
        return "T_max", scheduler.T_max
    if isinstance(scheduler, known.MultiStepLR):
        return "the last milestone", max(scheduler.milestones, default=None)
    if isinstance(scheduler, known.StepLR):
        return "step_size", scheduler.step_size
    return "", None


def _scale_scheduler(scheduler: Any, factor: float) -> None:
    """Multiply the rates in a torch scheduler, and in the schedulers that it chains."""
    for key in _SCHEDULED & vars(scheduler).keys():
        setattr(scheduler, key, [rate * factor for rate in getattr(scheduler, key)])
    for part in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(part, factor)


def _scale(group: dict[str, Any], key: str, factor: float) -> None:
    _put(group, key, float(group[key]) * factor)


def _put(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, dict):
        return {"pairs": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TaskError(
        f"the lr_scheduler keeps a {type(value).__name__}, which a checkpoint cannot hold: it takes numbers, strings, "
        "and lists and dicts of them."
    )


def _like(fresh: Any, state_dict: Any) -> Any:
    """The inverse of `_to_json`: values in the types of a fresh scheduler's state."""
    if isinstance(state_dict, dict):
        known = fresh if isinstance(fresh, dict) else {}
        items = {key: _like(known.get(key), value) for key, value in state_dict["pairs"]}
        return type(known)(items)
    if isinstance(state_dict, list):
        own = fresh if isinstance(fresh, (list, tuple)) else []
        values = [_like(a, b) for a, b in itertools.zip_longest(own, state_dict)][: len(state_dict)]
        return tuple(values) if isinstance(fresh, tuple) else values
    return torch.tensor(state_dict).to(fresh) if isinstance(fresh, torch.Tensor) else state_dict


def scheduler_factories(
    given: Any, optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Callable[[torch.optim.Optimizer], Any]]:
    """The factory of each optimizer's scheduler, by the names of optimizers, each tried on a dummy. Local.

    Args:
        given: One for all optimizers, a dict of them, or None; a factory, or a scheduler of a ready-made optimizer.
        optimizers: By name; they are not changed.

    Raises:
        TaskError: One cannot make a scheduler, or a name is no optimizer's.
    """
    if given is None:
        return {}
    if _is_ready(given):
        given = {name: given for name, optimizer in optimizers.items() if given.optimizer is optimizer} or given
    factories = dict(given) if isinstance(given, Mapping) else dict.fromkeys(optimizers, given)
    for name, factory in factories.items():
        if name not in optimizers:
            raise TaskError(f"lr_scheduler has a value for {name!r}, which is no optimizer.{suggest(name, optimizers)}")
        if not _is_ready(factory):
            check_scheduler(factory, optimizers[name])
        elif factory.optimizer is optimizers[name]:
            factories[name] = ReadyScheduler(factory)
        else:
            raise TaskError(
                f"lr_scheduler {type(factory).__name__} sets the rates of another optimizer: give that one as "
                "optimizer=... (--optimizer) too, or write lambda optimizer: ..., which makes a scheduler."
            )
    return factories


def _is_ready(given: Any) -> bool:
    known = torch.optim.lr_scheduler
    return isinstance(given, (known.LRScheduler, known.ReduceLROnPlateau))


def check_scheduler(make: Any, optimizer: torch.optim.Optimizer) -> None:
    """Try the factory on a dummy of `optimizer`, which is not changed. Local.

    Raises:
        TaskError: The factory fails, or does not return a scheduler.
    """
    name = getattr(make, "__name__", None) or type(make).__name__
    if not callable(make):
        raise TaskError(
            f"lr_scheduler must be a torch scheduler, or a callable that makes one from an optimizer, not a value of "
            f"type {type(make).__name__}: write lambda optimizer: ..."
        )
    groups = [{**group, "params": [torch.zeros(1)]} for group in optimizer.param_groups]
    dummy = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    dummy.param_groups = groups
    dummy.defaults = optimizer.defaults
    try:
        made = make(dummy)
    except Exception as error:  # the user's factory may raise anything
        raise TaskError(f"lr_scheduler {name} cannot make a scheduler: {type(error).__name__}: {error}.") from error
    if not callable(getattr(made, "step", None)):
        raise TaskError(f"lr_scheduler {name} returned {type(made).__name__}, not a torch scheduler.")
