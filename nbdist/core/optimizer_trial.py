"""Whether an optimizer gives the same where tensors are cut: tried, on small ones, whole and in parts."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import nn

from nbdist.core import seeds
from nbdist.core.eager import eager
from nbdist.core.optimizer_state import is_split

__all__ = ["differs"]

_LENGTHS = (6, 4, 2, 2)
"""Of the small tensors; of further dims 2."""
_STEPS, _SEED, _TOLERANCE = 3, 1_791_943, 1e-6


def differs(optimizer: torch.optim.Optimizer, *, flat: bool, along: bool, apart: bool) -> str:
    """Say how an optimizer's update of parts is not a part of its update, or nothing. Local; it stays as it is.

    For each group and number of dims a small float64 tensor is updated a few times by a copy of the optimizer, whole,
    and then in parts by two others.

    Args:
        optimizer: With its settings; one that cannot be tried is said to differ.
        flat: Whether tensors are dealt out flat in two halves.
        along: Whether they are cut along their first dim, or along their last.
        apart: Whether each half of the tensors is whole, and somewhere else.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would be waited for, longer than there is to do
    try:
        with seeds.kept(device), eager():
            return _difference(optimizer, flat=flat, along=along, apart=apart)
    finally:
        torch.set_num_threads(threads)


def _difference(optimizer: torch.optim.Optimizer, *, flat: bool, along: bool, apart: bool) -> str:
    try:
        wholes = _Trial(optimizer).run(lambda _place, tensor: tensor)
    except Exception as error:
        return f"cannot be tried on small tensors ({_line(error)})"
    cuts: list[Any] = []
    if flat:
        cuts.append(lambda rank: lambda _place, t: t.reshape(-1).chunk(2)[rank])
    if along:
        cuts.append(lambda rank: lambda _place, t: t.chunk(2, 0)[rank])
        cuts.append(lambda rank: lambda _place, t: t.chunk(2, -1)[rank])
    if apart:
        cuts.append(lambda rank: lambda place, t: t if place % 2 == rank else None)
    for cut in cuts:
        for rank in range(2):
            piece = cut(rank)
            try:
                parts = _Trial(optimizer).run(piece)
            except Exception as error:
                return f"cannot update a part of a tensor ({_line(error)})"
            for place, (whole, part) in enumerate(zip(wholes, parts, strict=True)):
                expected = piece(place, whole)
                if part is not None and expected is not None and not _same(expected, part, whole):
                    return "looks at a tensor as a whole" if not apart else "looks at all tensors together"
    return ""


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def _same(expected: torch.Tensor, part: torch.Tensor, whole: torch.Tensor) -> bool:
    scale = whole.abs().max().item()
    return bool(torch.allclose(part, expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True))


class _Trial:
    """A copy of an optimizer over small tensors of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._stands_for: list[tuple[int, nn.Parameter]] = []  # of each small tensor the group, and a real one
        for number, group in enumerate(optimizer.param_groups):
            by_dims = {p.ndim: p for p in reversed(group["params"]) if p.requires_grad and p.ndim}
            self._stands_for += [(number, p) for _, p in sorted(by_dims.items()) for _ in range(2)]

    def run(self, cut: Any) -> list[Any]:
        """Update parts, as `cut` makes them of the tensor at a place, and return how far each has moved."""
        generator = torch.Generator().manual_seed(_SEED)
        torch.manual_seed(_SEED)
        begun: list[Any] = []
        gradients: list[list[Any]] = []
        for place, (_, like) in enumerate(self._stands_for):
            shape = (*_LENGTHS, *[2] * like.ndim)[: like.ndim]
            drawn = torch.randn((1 + _STEPS, *shape), generator=generator, dtype=torch.float64).to(like.device)
            # Of other sizes from element to element, as real ones are: a mean of equals hides what looks at it.
            first, *others = [cut(place, value) for value in drawn]
            begun.append(first)
            gradients.append([g if g is None else g * 3.0**step for step, g in enumerate(others)])
        small = [None if value is None else nn.Parameter(value.clone()) for value in begun]
        made = self._copy(small)
        for step in range(_STEPS):
            for parameter, values in zip(small, gradients, strict=True):
                if parameter is not None:
                    parameter.grad = values[step].clone()
            _step(made, self._optimizer)
        return [None if p is None else p.detach() - value for p, value in zip(small, begun, strict=True)]

    def _copy(self, small: list[Any]) -> torch.optim.Optimizer:
        original = self._optimizer
        memo: dict[int, Any] = {id(original.state): defaultdict(dict)}
        groups = []
        for number, group in enumerate(original.param_groups):
            mine = {like.ndim: p for (of, like), p in zip(self._stands_for, small, strict=True) if of == number}
            for parameter in group["params"]:
                memo[id(parameter)] = mine.get(parameter.ndim, parameter)
            here = [p for (of, _), p in zip(self._stands_for, small, strict=True) if of == number and p is not None]
            groups.append({k: here if k == "params" else _copied(v, memo) for k, v in group.items()})
            if not here:
                groups[-1]["params"] = []
            lr = groups[-1].get("lr")
            if isinstance(lr, (int, float)) and lr == 0:  # a schedule begins there
                groups[-1]["lr"] = 0.01
        made: torch.optim.Optimizer = object.__new__(type(original))
        memo[id(original)], memo[id(original.param_groups)] = made, groups
        for name, value in vars(original).items():
            if name == "step":  # a scheduler's, which steps the original
                continue
            vars(made)[name] = OrderedDict() if name.startswith("_optimizer_") else _copied(value, memo)
        made.param_groups = groups
        made.state = defaultdict(dict)
        for (_, like), parameter in zip(self._stands_for, small, strict=True):
            state = original.state.get(like)
            if parameter is not None and state:
                small_state = {entry: _like(entry, v, like, parameter) for entry, v in state.items()}
                if all(v is not None for v in small_state.values()):
                    made.state[parameter] = small_state
        return made


def _like(entry: str, value: Any, like: nn.Parameter, parameter: nn.Parameter) -> Any:
    """An entry of a state, begun in the constructor or by earlier steps, for a small tensor; None: it has no such."""
    if is_split(entry, value, like.shape):
        return torch.full_like(parameter, value.reshape(-1)[0].item()) if value.numel() else None
    if isinstance(value, torch.Tensor):
        return value.clone() if value.ndim == 0 else None
    return copy.deepcopy(value)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a file, a lock: whatever cannot be copied is no part of the arithmetic
        return value


def _step(made: torch.optim.Optimizer, original: torch.optim.Optimizer) -> None:
    own = vars(original).get("step")
    if isinstance(own, types.MethodType) and own.__self__ is original and not hasattr(own, "_wrapped_by_lr_sched"):
        own.__func__(made)
    else:
        type(made).step(made)
