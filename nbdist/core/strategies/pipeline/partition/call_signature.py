"""The signature of a model call: structure, shapes, dtypes and constants of its arguments, without tensor values."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from nbdist.core.strategies.pipeline.partition.effects import Effect, from_tensor, store_
from nbdist.errors import TaskError
from nbdist.upstream.torch_private import pytree

__all__ = ["Call", "Constant", "FlatModel", "OutputStructure", "TensorLike", "leaves_of"]


@dataclass(frozen=True, kw_only=True)
class TensorLike:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Constant:
    """An argument that is not a tensor. Its type matters: True, 1 and 1.0 are different."""

    type: type
    value: Any


@dataclass(frozen=True, kw_only=True)
class Call:
    """The signature of one call of a model: hashable, and sent as plain text to the ranks of other stages.

    Args:
        structure: How arguments nest.
        leaves: The arguments in order.
    """

    structure: pytree.TreeSpec
    leaves: tuple[TensorLike | Constant, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[torch.Tensor]]:
        """Flatten the arguments of a call. Local.

        Returns:
            The signature, and the tensors among the arguments, in order.

        Raises:
            TaskError: An argument is neither a tensor nor hashable.
        """
        values, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return cls(structure=structure, leaves=tuple(map(_leaf, values))), tensors

    @functools.lru_cache(maxsize=64)  # noqa: B019 - few: one for each batch shape
    def to_text(self) -> str:
        """Serialize as JSON for another rank, see `from_text`. Local.

        Raises:
            TaskError: An argument cannot be written as JSON.
        """
        try:
            structure = pytree.treespec_dumps(self.structure)
        except Exception as error:
            raise TaskError(
                f"the model is called with arguments that cannot be sent to the ranks of the other stages ({error}): "
                "pass tensors, numbers, strings or None, in tuples, lists and dicts."
            ) from error
        return json.dumps([structure, [_plain(leaf) for leaf in self.leaves]])

    @classmethod
    @functools.lru_cache(maxsize=64)
    def from_text(cls, text: str) -> Call:
        """Parse the text of `to_text`. Safe for untrusted text: no code of it runs, unlike a pickle's. Local."""
        structure, leaves = json.loads(text)
        return cls(structure=pytree.treespec_loads(structure), leaves=tuple(_leaf_from_plain(*leaf) for leaf in leaves))

    def arguments(self, tensors: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rebuild ``(args, kwargs)`` with these tensors."""
        following = iter(tensors)
        values = [next(following) if isinstance(leaf, TensorLike) else leaf.value for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(values, self.structure)
        return args, kwargs

    @property
    def tensors(self) -> list[TensorLike]:
        """The tensors among the arguments, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorLike)]

    @property
    def batch(self) -> int:
        """Number of samples: the length of the first tensor's first dimension."""
        return next((leaf.shape[0] for leaf in self.tensors if leaf.shape), 1)

    def zeros(self, device: torch.device | str) -> list[torch.Tensor]:
        """Zeros in the shapes and dtypes of this call's tensors."""
        return [torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) for leaf in self.tensors]

    def same_but_for_tensors(self, other: Call) -> bool:
        """Whether the arguments nest in the same way, with the same constants."""
        return self.structure == other.structure and all(
            a == b or (isinstance(a, TensorLike) and isinstance(b, TensorLike))
            for a, b in zip(self.leaves, other.leaves, strict=True)
        )


class OutputStructure(nn.Module):
    """The structure of a model's output: unflattens its tensors. It is the last node of the last stage.

    A value of a class that is not registered as a pytree, such as a key-value cache, becomes None.

    Attributes:
        sent: How many of the tensors, the last ones, are of attributes that forward sets beside its output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.structure: Any = None
        self.constants: list[Any] = []  # with PLACE for tensors
        self.attributes: list[tuple[nn.Module, str, OutputStructure]] = []
        self.sent = 0
        self._left: list[tuple[nn.Module, str, Any]] = []

    def take(self, output: Any, attributes: Iterable[tuple[nn.Module, str, Any]] = ()) -> list[Any]:
        """Flatten `output`, save its structure, and return its tensors, proxies and symbolic integers.

        After those of the output come those of the values of `attributes`: module, name and value.
        """
        leaves, self.structure = pytree.tree_flatten(output)
        varies = [isinstance(leaf, (torch.Tensor, fx.Proxy, torch.SymInt)) for leaf in leaves]
        plain = [leaf if isinstance(leaf, PLAIN) else None for leaf in leaves]
        self.constants = [PLACE if v else leaf for leaf, v in zip(plain, varies, strict=True)]
        found = [leaf for leaf, v in zip(leaves, varies, strict=True) if v]
        for module, name, value in attributes:
            structure = OutputStructure()
            sent = structure.take(value)
            self.attributes.append((module, name, structure))
            self.sent += len(sent)
            found += sent
        return found

    @property
    def empty(self) -> bool:
        """Whether the output has no tensor."""
        return PLACE not in self.constants

    def forward(self, *values: Any) -> Any:
        """Rebuild the output, and set the attributes."""
        following = iter(values)
        output = self._unflattened(following)
        if self.attributes:
            sent = (from_tensor(value) for value in following)
            self._left = [(module, name, made._unflattened(sent)) for module, name, made in self.attributes]
            self.set_attributes()
        return output

    def set_attributes(self) -> None:
        """Set the attributes that the latest forward left once more: code in between may have reset them."""
        for module, name, value in self._left:
            setattr(module, name, value)

    def _unflattened(self, following: Iterator[Any]) -> Any:
        leaves = [next(following) if leaf is PLACE else leaf for leaf in self.constants]
        return pytree.tree_unflatten(leaves, self.structure)


PLACE = object()
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class FlatModel(nn.Module):
    """A model as a function from the list of its tensor arguments to the list of the tensors it returns.

    The attributes that a forward sets beside its output are restored, and their values are returned too.
    """

    def __init__(self, model: nn.Module, call: Call, effects: Sequence[Effect] = ()) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.effects = effects
        self.output_structures = [OutputStructure()]  # in a list, so that it is not registered as a submodule
        modules = dict(model.named_modules())
        self._places = [(modules[effect.module], effect.name) for effect in effects]
        self._before = [vars(module).get(name, PLACE) for module, name in self._places]
        self._buffers_before = {n: (m._buffers, dict(m._buffers)) for n, m in self.named_modules() if m._buffers}

    def forward(self, values: Any) -> list[Any]:
        """Call the model."""
        args, kwargs = self.call.arguments([values[i] for i in range(len(self.call.tensors))])
        output = self.model(*args, **kwargs)
        left = [
            (module, name, vars(module)[name])
            for (module, name), before in zip(self._places, self._before, strict=True)
            if vars(module).get(name, PLACE) is not before
        ]
        for path, (current, _) in self._buffers_before.items():
            for name, value in current.items():
                if isinstance(value, fx.Proxy):
                    value.tracer.create_proxy("call_function", store_, (f"{path}.{name}", value), {})
        self.restore()
        return self.output_structures[0].take(output, left)

    def restore(self) -> None:
        """Undo what a traced forward has left in the model."""
        for (module, name), before in zip(self._places, self._before, strict=True):
            if before is PLACE:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
        for current, saved in self._buffers_before.values():
            if any(isinstance(value, fx.Proxy) for value in current.values()):
                current.update(saved)


def leaves_of(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists, dicts and other registered containers."""
    return list(pytree.tree_leaves(value))


def _plain(leaf: TensorLike | Constant) -> tuple[str, Any]:
    """A leaf as its kind and a JSON value."""
    if isinstance(leaf, TensorLike):
        return "tensor", [list(leaf.shape), str(leaf.dtype)]
    value = leaf.value
    if value is None or type(value) in (bool, int, float, str):
        return "plain", value
    if type(value) is complex:
        return "complex", [value.real, value.imag]
    if type(value) is bytes:
        return "bytes", value.hex()
    if isinstance(value, (torch.dtype, torch.device)):
        return type(value).__name__, str(value)
    raise TaskError(
        f"the model is called with a {type(value).__name__}, which cannot be sent to the ranks of the other stages: "
        "pass a tensor, a number, a string or None."
    )


def _leaf_from_plain(kind: str, value: Any) -> TensorLike | Constant:
    """The inverse of `_plain`."""
    if kind == "tensor":
        return TensorLike(shape=tuple(value[0]), dtype=_dtype(value[1]))
    known: dict[str, Callable[[Any], Any]] = {
        "plain": lambda plain: plain, "complex": lambda parts: complex(*parts), "bytes": bytes.fromhex,
        "dtype": _dtype, "device": torch.device,
    }  # fmt: skip
    made = known[kind](value)
    return Constant(type=type(made), value=made)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch.")
    return found


def _leaf(value: Any) -> TensorLike | Constant:
    if isinstance(value, torch.Tensor):
        return TensorLike(shape=tuple(value.shape), dtype=value.dtype)
    try:
        hash(value)
    except TypeError:
        raise TaskError(
            f"the model is called with a {type(value).__name__}, which cannot be sent to the ranks of the other "
            "stages: pass a tensor, a number, a string or None."
        ) from None
    return Constant(type=type(value), value=value)
