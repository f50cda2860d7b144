"""The trained optimizer's state is loaded into the notebook's optimizer object, in place."""

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
from nbdist.core.transfer.slots import attributes

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
    """Neither a value nor a container: a function, say. The notebook's own object stays."""


@dataclass(frozen=True)
class _Items:
    """A list or another sequence; `arguments` of its constructor, such as the length of a deque."""

    kind: type[Any]
    arguments: tuple[Any, ...] = ()
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Pairs:
    """A dict or another mapping; `arguments` of its constructor, such as a default factory."""

    kind: type[Any]
    arguments: tuple[Any, ...] = ()
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Nested:
    """An optimizer, or one that it wraps."""

    attributes: dict[str, Any] = field(default_factory=dict)


class TrainedOptimizer:
    """A trained optimizer's content: state, groups and own attributes, with the model's tensors by name.

    Values, tensors, arrays, containers of them, and the same of a wrapped optimizer are loaded; other objects stay the
    notebook's. The optimizer's ``load_state_dict`` is not called: it casts, and runs hooks that training in one process
    would not have run.

    Args:
        optimizer: After the run, with gathered state.
        tensors: The model's parameters and buffers, by name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        self._content: Any = _Extractor(tensors).extract(optimizer)

    def load_into(self, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        """Load this content into the notebook's optimizer, over `tensors` of the same names. Local."""
        _Loader(tensors).load(optimizer, self._content)


class _Extractor:
    """Converts an optimizer to plain content; an object that occurs twice stays one object."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._memory = sorted(
            (p.data_ptr(), p.data_ptr() + p.nbytes) for p in tensors.values() if p.layout is torch.strided
        )
        self._known: dict[int, Any] = {}

    def extract(self, value: Any, *, in_state: bool = False) -> Any:
        kind = type(value)
        if id(value) in self._names:
            return _Named(self._names[id(value)])
        if id(value) in self._known:
            return self._known[id(value)]
        if kind in _VALUES or isinstance(value, np.generic) or kind is np.ndarray:
            return value
        if kind in (torch.Tensor, nn.Parameter):
            return _Other() if self._of_the_model(value) else value.detach()
        content: Any
        if isinstance(value, torch.optim.Optimizer):
            content = self._known[id(value)] = _Nested()
            for name, attribute in attributes(value).items():
                content.attributes[name] = self.extract(attribute, in_state=name == "state")
        elif kind in _SEQUENCES:
            content = self._known[id(value)] = _Items(kind, ((), value.maxlen) if kind is collections.deque else ())
            content.items.extend(self.extract(item, in_state=in_state) for item in value)
        elif kind in _MAPPINGS:
            factory = getattr(value, "default_factory", None)
            content = self._known[id(value)] = _Pairs(kind, (factory,) if isinstance(factory, type) else ())
            content.pairs.extend((self.extract(k), self.extract(v, in_state=in_state)) for k, v in value.items())
        else:
            return value if in_state else _Other()
        return content

    def _of_the_model(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of one of the model's, and so is loaded with the model."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return False
        i = bisect.bisect(self._memory, (tensor.data_ptr(), math.inf)) - 1
        return i >= 0 and tensor.data_ptr() < self._memory[i][1]


class _Loader:
    """Loads content into the notebook's objects. Containers are filled in place, so other references see it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._done: dict[int, Any] = {}
        self._used: set[int] = set()

    def load(self, old: Any, content: Any) -> Any:
        """The object for `content` in the notebook: `old`, filled, if its type fits; `_MISSING` if there is none."""
        if id(content) in self._done:
            return self._done[id(content)]
        if isinstance(content, _Other):
            return old
        if isinstance(content, _Named):
            return self._tensors[content.name]
        if isinstance(content, _Nested):
            return self._load_nested(old, content) if isinstance(old, torch.optim.Optimizer) else old
        if isinstance(content, (_Items, _Pairs)):
            return self._load_items(old, content) if isinstance(content, _Items) else self._load_pairs(old, content)
        if isinstance(content, torch.Tensor) and isinstance(old, torch.Tensor):
            return content.to(old.device)
        return content

    def _load_nested(self, old: torch.optim.Optimizer, content: _Nested) -> Any:
        self._done[id(content)] = old
        current = attributes(old)
        for name, value in content.attributes.items():
            new = self.load(current.get(name, _MISSING), value)
            if new is not _MISSING:
                setattr(old, name, new)
        move_state_(old)
        return old

    def _container(self, old: Any, content: Any) -> Any:
        """The notebook's container; a new one if that is of another type, or already used for other content."""
        new = old if type(old) is content.kind and id(old) not in self._used else content.kind(*content.arguments)
        self._done[id(content)] = new
        self._used.add(id(new))
        return new

    def _load_items(self, old: Any, content: _Items) -> Any:
        new = self._container(old, content)
        before = [] if content.kind in (set, frozenset) else list(new)
        before += [_MISSING] * (len(content.items) - len(before))
        items = [self.load(one, item) for one, item in zip(before, content.items, strict=False)]
        if any(item is _MISSING for item in items):
            new = old
        elif content.kind in (tuple, frozenset):
            new = content.kind(items)
        else:
            new.clear()
            (new.update if content.kind is set else new.extend)(items)
        self._done[id(content)] = new
        return new

    def _load_pairs(self, old: Any, content: _Pairs) -> Any:
        new = self._container(old, content)
        before = dict(new)
        items = {}
        for key, value in content.pairs:
            name = self.load(_MISSING, key)
            item = _MISSING if name is _MISSING else self.load(before.get(name, _MISSING), value)
            if item is not _MISSING:
                items[name] = item
        new.clear()
        new.update(items)
        return new
