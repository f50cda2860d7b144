"""Carried state: `nbdist.carried`, with which a step keeps values from batch to batch, one of each for every slice."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import Source, tensors_in
from nbdist.core.params.tagged_json import from_json, to_json
from nbdist.errors import PlanError, TaskError, suggest

__all__ = ["Carried", "CarriedState", "carried", "check_carried", "check_order"]

_AS_DATA = (
    "keep what it is made of, as env.state or generator.get_state(), or pickle.dumps(...) of it, since reading a "
    "checkpoint must run no code"
)


class Carried:
    """The values of one slice, as attributes, whose names are those that were given to `carried`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__["_values"] = values

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__["_values"]
        if name not in values:
            raise AttributeError(_no_name(name, values))
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        values = self.__dict__["_values"]
        if name not in values:
            raise TaskError(_no_name(name, values))
        values[name] = value


def _no_name(name: str, values: Mapping[str, Any]) -> str:
    return f"the step carries {', '.join(values) or 'nothing'}, not {name}.{suggest(name, values)}"


def carried(*, over_epochs: bool = False, **first: Any) -> Carried:
    """In a step, values that stay from batch to batch: for truncated backpropagation through time, and for memories.

    ``state = nbdist.carried(hidden=None)`` gives an object with the attribute ``hidden``: None in the first batch, and
    in each later one what the step has assigned to ``state.hidden`` in the batch before. Each slice of a batch has its
    own values. So the data has to be in order: sample ``i`` of a batch continues sample ``i`` of the batch before, all
    batches have the same size, and nothing is shuffled. The values are in snapshots and checkpoints, so a run goes on
    with them after a lost engine and after ``resume``.

    Every epoch, and every evaluation, begins with the first values again. Outside of a run they are the first values
    always. It has to stand in the step's own code, or in that of functions that it calls by name. Local.

    Args:
        over_epochs: Whether values stay from epoch to epoch too, as the state of an environment does that is played on.
        **first: Names, and their first values.

    Returns:
        The slice's values. What is assigned must be numbers, strings, bytes, tensors without graph (``detach()``),
        arrays, and lists, tuples and dicts of them.

    Raises:
        TaskError: nbdist did not find it in the step's code.
    """
    if _present is None:
        return Carried(dict(first))
    return _present.values(first, over_epochs)


@dataclass
class _Kept:
    """What a slice carries, after a step.

    Args:
        values: By name.
        step: The number of the step: of several that were saved, the newest counts.
        samples: Of the slice.
        over_epochs: The names that stay.
    """

    values: dict[str, Any]
    step: int = -1
    samples: int = 0
    over_epochs: list[str] = field(default_factory=list)


class CarriedState:
    """What the slices of this rank carry: after the last complete step, and in the one that is computed.

    Args:
        declared: Whether the step calls `carried`.
    """

    def __init__(self, declared: bool = False) -> None:
        self.declared = declared
        self._kept: dict[int, _Kept] = {}
        self._new: dict[int, _Kept] = {}
        self._slice: _Kept | None = None

    @property
    def any(self) -> bool:
        """Whether there is something to save."""
        return bool(self._kept)

    def begin(self) -> None:
        """A step begins, or is computed again. Local."""
        self._new = {}

    def in_use(self, part: Slice) -> _InUse:
        """Context in which a step runs on a slice. Local.

        Raises:
            TaskError: What the step carries cannot be kept, or belongs to another number of samples.
        """
        return _InUse(self, part)

    def begin_slice(self, part: Slice) -> None:
        """The slice begins with what it has kept. Local."""
        kept = self._kept.get(part.index)
        if kept is not None and part.samples:
            _check_samples(kept, part.samples)
        # A step may change them in place, and fail. Not `deepcopy`, which would copy all that a view is of.
        values = {} if kept is None else _mapped(kept.values, torch.Tensor.clone)
        self._slice = _Kept(values, samples=part.samples, over_epochs=[] if kept is None else [*kept.over_epochs])

    def end_slice(self, index: int) -> None:
        """The slice ends: what the step has assigned counts if the step ends. Local."""
        new = self._slice
        if new is not None and new.values and new.samples:  # a padding slice has another's data
            for name, value in new.values.items():
                _check_value(f"what the step carries as {name}", value)
            self._new[index] = new

    def values(self, first: Mapping[str, Any], over_epochs: bool) -> Carried:
        """See `carried`."""
        if not self.declared:
            raise TaskError(
                "nbdist.carried is called where nbdist did not find it: let it stand in the step's own code (a "
                "%%dist_train cell's body, or step=...), or in a function that this calls by name."
            )
        assert self._slice is not None
        for name, value in first.items():
            self._slice.values.setdefault(name, value)
        if over_epochs:
            self._slice.over_epochs = sorted({*self._slice.over_epochs, *first})
        return Carried(self._slice.values)

    def end_step(self, step: int) -> None:
        """A step is complete: what it has assigned counts. Local."""
        for index, new in self._new.items():
            new.step = step
            self._kept[index] = new
        self._new = {}

    def end_epoch(self) -> None:
        """An epoch is complete: the next one begins with the first values, but for those that stay. Local."""
        for index, kept in [*self._kept.items()]:
            kept.values = {name: value for name, value in kept.values.items() if name in kept.over_epochs}
            if not kept.values:
                del self._kept[index]

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Context of other steps, and of evaluations, which begin with the first values and leave nothing. Local."""
        global _present
        before = _present, self._slice, self._kept, self._new
        _present, self._slice, self._kept, self._new = self, _Kept({}), {}, {}
        try:
            yield
        finally:
            _present, self._slice, self._kept, self._new = before

    def state_dict(self, slices: int) -> dict[str, Any]:
        """As JSON-able data. Local; waits for the device.

        Args:
            slices: Of a batch.
        """
        return {"slices": slices, "kept": {str(index): _saved(kept) for index, kept in self._kept.items()}}

    def load(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Take over what ranks have saved; each slice is on one rank, whichever that is now. Local.

        Args:
            states: The `state_dict` of each rank that has one, see `check_carried`.
            device: Of the model.
        """
        self._kept = {}
        for index, saved in (item for state in states for item in state["kept"].items()):
            known = self._kept.get(int(index))
            if known is None or known.step < saved["step"]:
                self._kept[int(index)] = _loaded(saved, device)


_present: CarriedState | None = None


class _InUse:
    """See `CarriedState.in_use`; no generator, in whose frames errors would seem to be."""

    def __init__(self, carried: CarriedState, part: Slice) -> None:
        self._carried, self._part = carried, part

    def __enter__(self) -> None:
        global _present
        self._before = _present, self._carried._slice
        self._carried.begin_slice(self._part)
        _present = self._carried

    def __exit__(self, kind: Any, *_: object) -> None:
        global _present
        try:
            if kind is None:
                self._carried.end_slice(self._part.index)
        finally:
            _present, self._carried._slice = self._before


def check_carried(name: str, states: Sequence[Mapping[str, Any]], slices: int) -> None:
    """Check that a run can go on with what was saved. Local.

    Args:
        name: What it was saved in, for errors.
        states: The `CarriedState.state_dict` of each rank that has one.
        slices: Of a batch of the run.

    Raises:
        PlanError: The batches of the run have another number of slices.
    """
    for state in states:
        if state["kept"] and state["slices"] != slices:
            names = sorted({key for kept in state["kept"].values() for key in kept["values"]})
            raise PlanError(
                f"{name} has {', '.join(names)} of {state['slices']} slices, which the step carries from batch to "
                f"batch, and the batches of this run have {slices}: use as many ranks as before, or begin with "
                "--reproducible, which cuts every batch alike on any number of ranks."
            )


def check_order(carries: bool, data: Source, shuffle: bool | None, name: str) -> None:
    """Check that the order of the samples is not left open, where values are carried. Local.

    Args:
        carries: Whether they are.
        data: The training data.
        shuffle: What the user gave.
        name: The user's name for `data`.

    Raises:
        PlanError: It is: then they would be shuffled.
    """
    if carries and not data.is_fed and data.shuffle is None and shuffle is None:
        raise PlanError(
            "the step carries values from batch to batch, and samples are shuffled unless you say otherwise: give "
            f"shuffle=False (--shuffle no), if the batches of {name} continue each other, or shuffle=True."
        )


def _check_samples(kept: _Kept, samples: int) -> None:
    if samples == kept.samples:
        return
    for name, value in kept.values.items():
        if any(kept.samples in tensor.shape for tensor in tensors_in(value)):
            raise TaskError(
                f"a slice of {samples} samples follows one of {kept.samples}, of which {name} is carried: give batches "
                "of one size (a loader's drop_last=True, or a batch size that divides the samples)."
            )


def _check_value(what: str, value: Any) -> None:
    """Check that it can be saved, without a wait for its device."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise TaskError(
            f"{what} still has its graph, and the next batch would go back through it: assign it with detach(), as in "
            "state.hidden = hidden.detach()."
        )
    if type(value) in (list, tuple, collections.deque):
        for item in value:
            _check_value(what, item)
    elif type(value) is dict:
        for item in value.values():
            _check_value(what, item)
    elif not (type(value) is torch.Tensor and value.layout is torch.strided):
        try:
            to_json(value, what)
        except TaskError:
            raise TaskError(f"{what} is a {type(value).__name__}, which cannot be saved: {_AS_DATA}.") from None


def _mapped(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """A copy of lists, tuples, dicts and deques, with the function's results in place of tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    if type(value) is collections.deque:
        return collections.deque((_mapped(item, function) for item in value), value.maxlen)
    if type(value) is dict:
        return {key: _mapped(item, function) for key, item in value.items()}
    return copy.deepcopy(value)


def _saved(kept: _Kept) -> dict[str, Any]:
    values = {name: to_json(value, name) for name, value in kept.values.items()}
    over = [name for name in kept.over_epochs if name in values]
    return {"step": kept.step, "samples": kept.samples, "over_epochs": over, "values": values}


def _loaded(saved: Mapping[str, Any], device: torch.device) -> _Kept:
    values = {name: from_json(value, device) for name, value in saved["values"].items()}
    return _Kept(values, saved["step"], saved["samples"], list(saved["over_epochs"]))
