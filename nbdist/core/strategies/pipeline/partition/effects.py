"""What a forward leaves in attributes beside its output: observed in the whole model, carried to the last stage.

The step runs on the last stage's rank, and may read such an attribute after the call: an auxiliary loss, say. So its
value crosses the cuts like any other, and is set there when the step calls the model.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from nbdist.core.params.extra_state import stateful_modules
from nbdist.core.params.preserve_model import device_of, preserve_model
from nbdist.core.process.rng import seed_all, seed_torch
from nbdist.errors import TaskError

__all__ = [
    "SEED",
    "Effect",
    "ReadAttributes",
    "effects_of",
    "from_tensor",
    "refusal",
    "set_data_",
    "store_",
    "to_tensor",
]

SEED = (
    7_352_801  # not the user's seed: random numbers that were baked in while tracing then differ from those drawn here
)
_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, buffers, hooks and mode."""
_NUMBER = (1,) * 8
"""The shape of a tensor that carries a Python number: its dtype tells which; uint8 is None."""
_NUMBERS: dict[type, torch.dtype] = {
    bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128, type(None): torch.uint8
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An attribute that each forward sets or changes.

    Args:
        module: The module's name in the model.
        name: The attribute's.
        counts: Whether its value depends on the calls before, as a counter's does.
        sendable: Whether it is a tensor or a number, which another rank can be sent.
    """

    module: str
    name: str
    counts: bool
    sendable: bool

    def __str__(self) -> str:
        return ".".join(filter(None, ("self", self.module, self.name)))


def effects_of(model: nn.Module, forward: Callable[[], Any]) -> tuple[Effect, ...]:
    """The effects of `forward`, which calls the model, in training and in evaluation. Local; nothing is changed.

    Attributes that only the first call sets, such as tables that are made once, are none.
    """
    found: dict[tuple[str, str], Effect] = {}
    for evaluating in (False, True):
        try:
            with preserve_model(model), torch.no_grad():
                if evaluating:
                    model.eval()
                if not _changes(model, forward):
                    continue
                for effect in _changes(model, forward):
                    found.setdefault((effect.module, effect.name), effect)
        except Exception:
            if not evaluating:  # a model may not be able to evaluate these arguments: nor will it have to
                raise
    return tuple(found.values())


def _changes(model: nn.Module, forward: Callable[[], Any]) -> list[Effect]:
    """The attributes that one call sets or changes."""
    names = {id(module): name for name, module in model.named_modules()}
    before = {id(module): _attributes(module) for module in model.modules()}
    copies = {key: {name: _frozen(value) for name, value in own.items()} for key, own in before.items()}
    assigned = set[tuple[int, str]]()
    with _assignments(assigned):
        seed_all(SEED)
        seed_torch(SEED, device_of(model))
        forward()
    effects = []
    kept_whole = {id(module) for name, module in stateful_modules(model).items() if name}
    for module in model.modules():
        if id(module) in kept_whole:  # with extra state, which goes home by itself
            continue
        known = copies.get(id(module), {})
        for name, value in _attributes(module).items():
            if isinstance(value, nn.Module) or callable(value):
                continue
            counts = name not in known or not _same(known[name], _frozen(value))
            if counts or (id(module), name) in assigned:
                sendable = isinstance(value, (torch.Tensor, *_NUMBERS))
                effects.append(Effect(module=names[id(module)], name=name, counts=counts, sendable=sendable))
    return effects


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OWN}


@contextlib.contextmanager
def _assignments(assigned: set[tuple[int, str]]) -> Iterator[None]:
    """Context that notes each assignment to a module's attribute: a value may be the same as before."""
    own = nn.Module.__setattr__

    def note(self: nn.Module, name: str, value: Any) -> None:
        own(self, name, value)
        assigned.add((id(self), name))

    with mock.patch.object(nn.Module, "__setattr__", note):
        yield


def _frozen(value: Any) -> Any:
    """A copy to compare with later: of tensors and of the usual containers; None of what cannot be compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_frozen(item) for item in value]
    if isinstance(value, (set, frozenset, bytearray)):
        return type(value)(value)
    return value if isinstance(value, (str, bytes, *_NUMBERS)) else None


def _same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
        return alike and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(item, second[key]) for key, item in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second) or first != first


class ReadAttributes(nn.Module):
    """A node right after a child that is called as a whole: it reads attributes that the call has left."""

    def __init__(self, places: list[tuple[nn.Module, str]], counting: list[nn.Module]) -> None:
        super().__init__()
        self.places, self.counting = places, counting  # in lists, so that they are not submodules

    def forward(self, _output: Any) -> tuple[Any, ...]:
        """The values of the attributes."""
        return tuple(vars(module).get(name) for module, name in self.places)


def refusal(model: nn.Module, effect: Effect) -> TaskError:
    """The error for an attribute that a pipeline cannot keep."""
    why = "depends on the calls before" if effect.counts else "is neither a tensor nor a number"
    return TaskError(
        f"{type(model).__name__} cannot be cut into stages: its forward changes {effect}, whose value {why}: make it a "
        "buffer (register_buffer, and write to it in place), set it in the step, or use the strategy data."
    )


@torch.no_grad()
def store_(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Give a buffer the values that forward assigned to its name. Local.

    Raises:
        TaskError: They have another shape or dtype.
    """
    if value.shape != buffer.shape or value.dtype != buffer.dtype:
        raise TaskError(
            f"forward assigns a {value.dtype} of shape {tuple(value.shape)} to a buffer of {buffer.dtype}, shape "
            f"{tuple(buffer.shape)}: on a mesh with pp a buffer keeps both, so convert it, or use the strategy data."
        )
    buffer.copy_(value)


def set_data_(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value``, in place where both are alike: a buffer's memory stays the same. Local."""
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.data.copy_(value.detach())
    else:
        tensor.data = value


def to_tensor(value: Any) -> torch.Tensor:
    """An attribute as a tensor that can be sent; a number lies on the CPU, where reading it waits for no device."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full(_NUMBER, value or 0, dtype=_NUMBERS[type(value)])


def from_tensor(tensor: torch.Tensor) -> Any:
    """The inverse of `to_tensor`."""
    if tensor.shape != _NUMBER:
        return tensor
    return None if tensor.dtype == torch.uint8 else tensor.item()


def pack(value: Any) -> bytes:
    """An attribute, a tensor or a number, as plain bytes. Local."""
    tensor = to_tensor(value).detach().cpu().contiguous()
    head = json.dumps([str(tensor.dtype)[6:], list(tensor.shape)]).encode()
    return head + b"\n" + tensor.view(-1).view(torch.uint8).numpy().tobytes()


def unpack(data: bytes, device: torch.device) -> Any:
    """The inverse of `pack`, with a tensor on a device; it runs no code, whatever the bytes are. Local."""
    head, _, body = data.partition(b"\n")
    name, shape = json.loads(head)
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch.")
    tensor = torch.frombuffer(bytearray(body), dtype=dtype).view(shape) if body else torch.empty(shape, dtype=dtype)
    value = from_tensor(tensor)
    return value.to(device) if isinstance(value, torch.Tensor) else value
