"""Whether an optimizer gives the same where tensors are cut: tried, on small ones, whole and in parts."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from nbdist.core.optim.state import is_split, told_entry
from nbdist.core.process import rng
from nbdist.core.process.lazy_dynamo import eager
from nbdist.errors import TaskError

__all__ = ["differs"]

_Cut: TypeAlias = Callable[..., Any]
_LENGTH, _STEPS = 32, 12
"""Of the small tensors, in their first two dims, while further dims have 2; and how often they are updated."""
_REACH = 128
"""Up to so many, if the settings of an optimizer have such a number: some look at large tensors only, or later."""
_SEED, _TOLERANCE = 1_791_943, 1e-6


def differs(optimizer: torch.optim.Optimizer, *, flat: bool, along: bool, apart: bool, told: bool = False) -> str:
    """Say how an optimizer's update of parts is not a part of its update, or nothing. Local; it stays as it is.

    For each group and number of dims two small float64 tensors are updated by a copy of the optimizer, whole, and in
    parts by others.

    Args:
        optimizer: With its settings; one that cannot be tried is said to differ.
        flat: Whether tensors are dealt out flat in two halves.
        along: Whether they are cut along their first dim, or along their last.
        apart: Whether each half of the tensors is whole, and somewhere else.
        told: Whether one rank has to tell another of its state.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would be waited for, longer than there is to do
    try:
        with rng.kept(device), eager():
            return _difference(optimizer, _cuts(flat=flat, along=along, apart=apart), told, device)
    finally:
        torch.set_num_threads(threads)


def _cuts(*, flat: bool, along: bool, apart: bool) -> list[_Cut]:
    """What a rank has of the tensor at a place, of each rank of each way to cut."""
    cuts: list[_Cut] = []
    for rank in range(2):
        if flat:
            cuts.append(lambda _place, t, rank=rank: t.reshape(-1).chunk(2)[rank])
        if along:
            cuts.append(lambda _place, t, rank=rank: t.chunk(2, 0)[rank])
            cuts.append(lambda _place, t, rank=rank: t.chunk(2, -1)[rank])
        if apart:
            cuts.append(lambda place, t, rank=rank: t if place % 2 == rank else None)
    return cuts


def _difference(optimizer: torch.optim.Optimizer, cuts: list[_Cut], told: bool, device: torch.device) -> str:
    """What is seen first, in the update or the state; all are updated side by side, so that it is seen early."""
    generator = torch.Generator().manual_seed(_SEED)
    stands_for = _stands_for(optimizer)
    numbers = _numbers(optimizer)
    length, steps = max(_LENGTH, *numbers), max(_STEPS, *(2 + number for number in numbers))
    shapes = [(length + 2, length, *[2] * like.ndim)[: like.ndim] for _, like in stands_for]

    def draw() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]

    begun, common = draw(), draw()
    try:
        whole = _Trial(optimizer, stands_for, begun, lambda _place, tensor: tensor)
    except Exception as error:
        return f"cannot be tried on small tensors ({_line(error)})"
    parts: list[_Trial] = []
    for step in range(steps):
        # Gradients agree from step to step, as real ones do: some go by how far all has come.
        gradients = [(c + 0.3 * g) * 1.3 ** (step % 8) for c, g in zip(common, draw(), strict=True)]
        seeded = functools.partial(rng.seed_torch, _SEED + step, device)  # what draws, draws the same in each
        try:
            seeded()
            whole.step(gradients)
        except Exception as error:
            return f"cannot be tried on small tensors ({_line(error)})"
        try:
            parts = parts or [_Trial(optimizer, stands_for, begun, cut) for cut in cuts]
            for part in parts:
                seeded()
                part.step(gradients)
        except Exception as error:
            return f"cannot update a part of a tensor ({_line(error)})"
        moved = whole.moved
        for part in parts:
            if not part.is_part_of(moved):
                together = any(value is None for value in part.moved)
                return "looks at all tensors together" if together else "looks at a tensor as a whole"
    return whole.untold if told else ""


def _numbers(optimizer: torch.optim.Optimizer) -> list[int]:
    """The numbers in its settings that may be a size or a step at which an optimizer begins something."""
    settings = [v for group in optimizer.param_groups for k, v in group.items() if k != "params"]
    return [0] + [v for v in (*settings, *vars(optimizer).values()) if isinstance(v, int) and v <= _REACH]


def _stands_for(optimizer: torch.optim.Optimizer) -> list[tuple[int, nn.Parameter]]:
    """Of each small tensor the group, and a real one."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        by_dims = {p.ndim: p for p in reversed(group["params"]) if p.requires_grad and p.ndim}
        found += [(number, p) for _, p in sorted(by_dims.items()) for _ in range(2)]
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


class _Trial:
    """A copy of an optimizer over small tensors of its own: parts of those that have been drawn.

    Args:
        optimizer: To be copied.
        stands_for: See `_stands_for`.
        begun: The drawn tensors.
        cut: Which part of each is here.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, stands_for: list[tuple[int, nn.Parameter]], begun: list[torch.Tensor],
        cut: _Cut,
    ) -> None:  # fmt: skip
        self._optimizer = optimizer
        self._stands_for = stands_for
        self._cut = cut
        self._begun = [cut(place, value) for place, value in enumerate(begun)]
        self._small = [None if value is None else nn.Parameter(value.clone()) for value in self._begun]
        self._made = self._copy(self._small)

    def step(self, gradients: list[torch.Tensor]) -> None:
        """Update the parts by their parts of gradients."""
        for place, (parameter, gradient) in enumerate(zip(self._small, gradients, strict=True)):
            if parameter is not None:
                parameter.grad = self._cut(place, gradient).clone()
        _step(self._made, self._optimizer)

    @property
    def moved(self) -> list[Any]:
        """How far each part has moved; None for one that is not here."""
        return [None if p is None else p.detach() - value for p, value in zip(self._small, self._begun, strict=True)]

    def is_part_of(self, wholes: list[torch.Tensor]) -> bool:
        """Whether each part has moved as that part of the whole tensor has."""
        for place, (whole, part) in enumerate(zip(wholes, self.moved, strict=True)):
            if part is not None:
                scale = whole.abs().max().item()
                expected = self._cut(place, whole)
                if not torch.allclose(part, expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
                    return False
        return True

    @property
    def untold(self) -> str:
        """What is in the state that one rank cannot tell another, as a clause, or nothing."""
        for state in self._made.state.values():
            for entry, value in state.items() if isinstance(state, dict) else ():
                try:
                    told_entry(entry, value)
                except TaskError:
                    return f"keeps a {type(value).__name__} in its state, {entry!r}"
        return ""

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
            if isinstance(lr, (int, float, torch.Tensor)):  # small ones, and zero at first, show less
                groups[-1]["lr"] = torch.ones_like(lr) if isinstance(lr, torch.Tensor) else 1.0
        made: torch.optim.Optimizer = object.__new__(type(original))
        memo[id(original)], memo[id(original.param_groups)] = made, groups
        for name, value in vars(original).items():
            if name == "step":  # a scheduler's, which steps the original
                continue
            vars(made)[name] = OrderedDict() if name.startswith("_optimizer_") else _copied(value, memo)
        made.param_groups = groups
        of_all = {key: v for key, v in original.state.items() if not isinstance(key, torch.Tensor)}
        made.state = defaultdict(dict, _copied(of_all, memo))
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
