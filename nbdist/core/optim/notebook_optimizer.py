"""How an optimizer of the user's own comes home: what a run has made of it is put into the very same object."""

from __future__ import annotations

import bisect
import collections
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdist.core.optim.state import move_state_
from nbdist.core.transfer.pickler import attributes

__all__ = ["TrainedOptimizer"]

_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MISSING: Any = object()


@dataclass(frozen=True)
class _Named:
    """A parameter or buffer of the model."""

    name: str


@dataclass(frozen=True)
class _Other:
    """What is neither a value nor a container: a function, say. The one at home stays."""


@dataclass(frozen=True)
class _Items:
    """A list, or the like; what it is made with, such as the length of a deque."""

    kind: type[Any]
    made_with: tuple[Any, ...] = ()
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Pairs:
    """A dict, or the like; what it is made with, such as the type of what is missing."""

    kind: type[Any]
    made_with: tuple[Any, ...] = ()
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Nested:
    """An optimizer, and those that it wraps."""

    attributes: dict[str, Any] = field(default_factory=dict)


class TrainedOptimizer:
    """All that an optimizer holds: its state, its groups and what it keeps itself, with the model's tensors by name.

    Values, tensors, arrays, containers of them and what is in an optimizer that it wraps come home; other objects stay
    as they are there. Nothing of the optimizer's own is called: ``load_state_dict`` casts, and runs hooks that one
    process would not have run.

    Args:
        optimizer: As the run has left it, with whole state.
        tensors: The model's parameters and buffers, by name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        self._told: Any = _Taking(tensors).told(optimizer)

    def put_into(self, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        """Make the optimizer at home, over `tensors` of the same names, what this one has become. Local."""
        _Putting(tensors).put(optimizer, self._told)


class _Taking:
    """Takes an optimizer apart; what occurs twice is one thing still."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._memory = sorted(
            (p.data_ptr(), p.data_ptr() + p.nbytes) for p in tensors.values() if p.layout is torch.strided
        )
        self._known: dict[int, Any] = {}

    def told(self, value: Any, *, in_state: bool = False) -> Any:
        kind = type(value)
        if id(value) in self._names:
            return _Named(self._names[id(value)])
        if id(value) in self._known:
            return self._known[id(value)]
        if kind in _VALUES or isinstance(value, np.generic) or kind is np.ndarray:
            return value
        if kind in (torch.Tensor, nn.Parameter):
            return _Other() if self._of_the_model(value) else value.detach()
        told: Any
        if isinstance(value, torch.optim.Optimizer):
            told = self._known[id(value)] = _Nested()
            for name, held in attributes(value).items():
                told.attributes[name] = self.told(held, in_state=name == "state")
        elif kind in _SEQUENCES:
            told = self._known[id(value)] = _Items(kind, ((), value.maxlen) if kind is collections.deque else ())
            told.items.extend(self.told(item, in_state=in_state) for item in value)
        elif kind in _MAPPINGS:
            factory = getattr(value, "default_factory", None)
            told = self._known[id(value)] = _Pairs(kind, (factory,) if isinstance(factory, type) else ())
            told.pairs.extend((self.told(key), self.told(held, in_state=in_state)) for key, held in value.items())
        else:
            return value if in_state else _Other()
        return told

    def _of_the_model(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of one of the model's, and so comes home as that does."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return False
        i = bisect.bisect(self._memory, (tensor.data_ptr(), math.inf)) - 1
        return i >= 0 and tensor.data_ptr() < self._memory[i][1]


class _Putting:
    """Puts what was told into the objects at home: containers are filled, so whoever else holds one sees it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._done: dict[int, Any] = {}
        self._taken: set[int] = set()

    def put(self, old: Any, told: Any) -> Any:
        """What stands for `told` here, made of `old` where that fits; `_MISSING` where there is nothing."""
        if id(told) in self._done:
            return self._done[id(told)]
        if isinstance(told, _Other):
            return old
        if isinstance(told, _Named):
            return self._tensors[told.name]
        if isinstance(told, _Nested):
            return self._put_nested(old, told) if isinstance(old, torch.optim.Optimizer) else old
        if isinstance(told, (_Items, _Pairs)):
            return self._put_items(old, told) if isinstance(told, _Items) else self._put_pairs(old, told)
        if isinstance(told, torch.Tensor) and isinstance(old, torch.Tensor):
            return told.to(old.device)
        return told

    def _put_nested(self, old: torch.optim.Optimizer, told: _Nested) -> Any:
        self._done[id(told)] = old
        mine = attributes(old)
        for name, value in told.attributes.items():
            here = self.put(mine.get(name, _MISSING), value)
            if here is not _MISSING:
                setattr(old, name, here)
        move_state_(old)
        return old

    def _here(self, old: Any, told: Any) -> Any:
        """The container at home, unless it is of another kind or stands for something else already."""
        here = old if type(old) is told.kind and id(old) not in self._taken else told.kind(*told.made_with)
        self._done[id(told)] = here
        self._taken.add(id(here))
        return here

    def _put_items(self, old: Any, told: _Items) -> Any:
        here = self._here(old, told)
        before = [] if told.kind in (set, frozenset) else list(here)
        before += [_MISSING] * (len(told.items) - len(before))
        items = [self.put(one, item) for one, item in zip(before, told.items, strict=False)]
        if any(item is _MISSING for item in items):
            here = old
        elif told.kind in (tuple, frozenset):
            here = told.kind(items)
        else:
            here.clear()
            (here.update if told.kind is set else here.extend)(items)
        self._done[id(told)] = here
        return here

    def _put_pairs(self, old: Any, told: _Pairs) -> Any:
        here = self._here(old, told)
        before = dict(here)
        items = {}
        for key, value in told.pairs:
            name = self.put(_MISSING, key)
            held = _MISSING if name is _MISSING else self.put(before.get(name, _MISSING), value)
            if held is not _MISSING:
                items[name] = held
        here.clear()
        here.update(items)
        return here
