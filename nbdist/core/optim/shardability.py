"""Whether an optimizer's update is the same on sharded tensors: numerically verified on small tensors."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from nbdist.core.optim.optimizer_modes import set_mode
from nbdist.core.optim.state import entry_to_json, is_split
from nbdist.core.process import rng
from nbdist.core.process.lazy_dynamo import skip_dynamo_import
from nbdist.errors import TaskError

__all__ = ["differs", "state_numbers", "steps_with_closure_only"]

_Cut: TypeAlias = Callable[..., Any]
_LENGTH, _STEPS, _OUTWARD, _SLOW = 32, 12, 8, 8
"""Length of the small tensors in their first two dims (further dims have 2), and number of updates: at a rate of 1;
then some that make the tensors grow; then some at a small rate.

The first two numbers grow to an optimizer's integer settings up to `_MAX_SETTING`: some treat larger tensors, or later
steps, differently.
"""
_SLOW_RATE = 0.01
_MAX_SETTING = 128
_SEED, _TOLERANCE = 1_791_943, 1e-6
_OF_ADAM = 2.0


def differs(optimizer: torch.optim.Optimizer, *, flat: bool, along: bool, apart: bool, sent: bool = False) -> str:
    """How an optimizer's update of a part differs from that part of the whole update; empty if it does not. Local.

    For each group and number of dims, one copy of the optimizer updates two small float64 tensors, and other copies
    update parts of them. The optimizer itself is not changed.

    Args:
        optimizer: With its settings; one that cannot be tried counts as different.
        flat: Whether tensors are sharded flat, in two halves.
        along: Whether tensors are split along their first dim, or along their last.
        apart: Whether half of the tensors, each whole, are on another rank.
        sent: Whether its state must be sent to another rank.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that waiting for threads takes longer
    try:
        with rng.fork_rng(device), skip_dynamo_import():
            return _difference(optimizer, _cuts(flat=flat, along=along, apart=apart), sent, device)
    finally:
        torch.set_num_threads(threads)


def state_numbers(optimizer: torch.optim.Optimizer) -> float:
    """Numbers of state for each element of a parameter (Adam: 2), found in one step on small tensors. Local.

    One that cannot be tried counts as Adam.
    """
    examples, device, initial = _ones(optimizer)
    with rng.fork_rng(device), skip_dynamo_import():
        try:
            trial = _Trial(optimizer, examples, initial, lambda _index, tensor: tensor)
            trial.step(initial)
        except Exception:
            return _OF_ADAM
    return trial.state_numel / max(1, sum(tensor.numel() for tensor in initial))


def steps_with_closure_only(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step on small tensors raises an error, but none if it gets a closure. Local."""
    examples, device, initial = _ones(optimizer)
    raised = []
    with rng.fork_rng(device), skip_dynamo_import():
        for given in ([], [lambda: torch.ones((), dtype=torch.float64, device=device)]):
            try:
                _Trial(optimizer, examples, initial, lambda _index, tensor: tensor).step(initial, *given)
            except Exception:
                raised.append(len(given))
    return raised == [0]


def _ones(
    optimizer: torch.optim.Optimizer,
) -> tuple[list[tuple[int, nn.Parameter]], torch.device, list[torch.Tensor]]:
    """`_examples`, their device, and a small tensor of ones for each."""
    examples = _examples(optimizer)
    device = next((p.device for _, p in examples), torch.device("cpu"))
    return examples, device, [
        torch.ones([_LENGTH, _LENGTH, *[2] * like.ndim][: like.ndim], device=device) for _, like in examples
    ]  # fmt: skip


def _cuts(*, flat: bool, along: bool, apart: bool) -> list[_Cut]:
    """For each way to cut, and each of two ranks: a function from a tensor's index and value to the rank's part."""
    cuts: list[_Cut] = []
    for rank in range(2):
        if flat:
            cuts.append(lambda _index, t, rank=rank: t.reshape(-1).chunk(2)[rank])
        if along:
            cuts.append(lambda _index, t, rank=rank: t.chunk(2, 0)[rank])
            cuts.append(lambda _index, t, rank=rank: t.chunk(2, -1)[rank])
        if apart:
            cuts.append(lambda index, t, rank=rank: t if index % 2 == rank else None)
    return cuts


def _difference(optimizer: torch.optim.Optimizer, cuts: list[_Cut], sent: bool, device: torch.device) -> str:
    """The first difference, in the update or the state; all copies step in turn, so that it is found early."""
    generator = torch.Generator().manual_seed(_SEED)
    examples = _examples(optimizer)
    numbers = _numbers(optimizer)
    length, steps = max(_LENGTH, *numbers), max(_STEPS, *(2 + number for number in numbers))
    shapes = [(length + 2, length, *[2] * like.ndim)[: like.ndim] for _, like in examples]

    def draw() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]

    initial, common = draw(), draw()
    try:
        whole = _Trial(optimizer, examples, initial, lambda _index, tensor: tensor)
    except Exception as error:
        return f"cannot be tried on small tensors ({_line(error)})"
    parts: list[_Trial] = []
    for step in range(steps + _OUTWARD + _SLOW):
        # Gradients have a common part, as real ones do: some optimizers depend on the distance from the start, some on
        # whether the norms of tensors grow, some on the change of a gradient over the length of the step.
        directions = [-tensor for tensor in initial] if steps <= step < steps + _OUTWARD else common
        if step == steps + _OUTWARD:
            for trial in (whole, *parts):
                trial.set_rate(_SLOW_RATE)
        gradients = [(c + 0.3 * g) * 1.3 ** (step % 8) for c, g in zip(directions, draw(), strict=True)]
        seeded = functools.partial(rng.seed_torch, _SEED + step, device)  # the same random numbers in each copy
        try:
            seeded()
            whole.step(gradients)
        except Exception as error:
            return f"cannot be tried on small tensors ({_line(error)})"
        try:
            parts = parts or [_Trial(optimizer, examples, initial, cut) for cut in cuts]
            for part in parts:
                seeded()
                part.step(gradients)
        except Exception as error:
            return f"cannot update a part of a tensor ({_line(error)})"
        moved = whole.moved
        for part in parts:
            if not part.is_part_of(moved):
                together = any(value is None for value in part.moved)
                return "needs all tensors together" if together else "needs a whole tensor"
    return whole.unsendable if sent else ""


def _numbers(optimizer: torch.optim.Optimizer) -> list[int]:
    """The integer settings that may be a tensor size, or a step, from which on the optimizer works differently."""
    settings = [v for group in optimizer.param_groups for k, v in group.items() if k != "params"]
    return [0] + [v for v in (*settings, *vars(optimizer).values()) if isinstance(v, int) and v <= _MAX_SETTING]


def _examples(optimizer: torch.optim.Optimizer) -> list[tuple[int, nn.Parameter]]:
    """For each small tensor its group's number, and a real parameter that it is modelled on."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        by_dims = {p.ndim: p for p in reversed(group["params"]) if p.requires_grad and p.ndim}
        found += [(number, p) for _, p in sorted(by_dims.items()) for _ in range(2)]
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


class _Trial:
    """A copy of an optimizer over parts of small tensors.

    Args:
        optimizer: To be copied.
        examples: See `_examples`.
        initial: The small tensors, whole.
        cut: The part of each that this copy has.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, examples: list[tuple[int, nn.Parameter]], initial: list[torch.Tensor],
        cut: _Cut,
    ) -> None:  # fmt: skip
        self._optimizer = optimizer
        self._examples = examples
        self._cut = cut
        self._initial = [cut(index, value) for index, value in enumerate(initial)]
        self._small = [None if value is None else nn.Parameter(value.clone()) for value in self._initial]
        self._made = self._copy(self._small)
        set_mode(self._made, training=True)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all groups, and measure `moved` from where the parts are now."""
        _set_rate(self._made, rate)
        self._initial = [None if p is None else p.detach().clone() for p in self._small]

    def step(self, gradients: list[torch.Tensor], *closure: Callable[[], torch.Tensor]) -> None:
        """Update the parts by their parts of gradients; a `closure` is passed on."""
        for index, (parameter, gradient) in enumerate(zip(self._small, gradients, strict=True)):
            if parameter is not None:
                parameter.grad = self._cut(index, gradient).clone()
        _step(self._made, self._optimizer, *closure)

    @property
    def moved(self) -> list[Any]:
        """The total update of each part since the rate was set; None for a tensor of which this copy has no part."""
        return [None if p is None else p.detach() - value for p, value in zip(self._small, self._initial, strict=True)]

    def is_part_of(self, wholes: list[torch.Tensor]) -> bool:
        """Whether each part's update equals that part of the whole tensor's update."""
        for index, (whole, part) in enumerate(zip(wholes, self.moved, strict=True)):
            if part is not None:
                scale = whole.abs().max().item()
                expected = self._cut(index, whole)
                if not torch.allclose(part, expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
                    return False
        return True

    @property
    def state_numel(self) -> int:
        """Numbers in the state of all tensors."""
        states = [self._made.state.get(parameter, {}) for parameter in self._small if parameter is not None]
        return sum(v.numel() for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.ndim)

    @property
    def unsendable(self) -> str:
        """The first state entry that cannot be sent to another rank, as a clause; else empty."""
        for state in self._made.state.values():
            for entry, value in state.items() if isinstance(state, dict) else ():
                try:
                    entry_to_json(entry, value)
                except TaskError:
                    return f"keeps a {type(value).__name__} in its state, {entry!r}"
        return ""

    def _copy(self, small: list[Any]) -> torch.optim.Optimizer:
        original = self._optimizer
        memo: dict[int, Any] = {id(original.state): defaultdict(dict)}
        groups = []
        for number, group in enumerate(original.param_groups):
            mine = {like.ndim: p for (of, like), p in zip(self._examples, small, strict=True) if of == number}
            for parameter in group["params"]:
                memo[id(parameter)] = mine.get(parameter.ndim, parameter)
            here = [p for (of, _), p in zip(self._examples, small, strict=True) if of == number and p is not None]
            groups.append({k: here if k == "params" else _copied(v, memo) for k, v in group.items()})
            if not here:
                groups[-1]["params"] = []
        made: torch.optim.Optimizer = object.__new__(type(original))
        memo[id(original)], memo[id(original.param_groups)] = made, groups
        for name, value in vars(original).items():
            if name == "step":  # a scheduler's wrapper, which would step the original
                continue
            vars(made)[name] = OrderedDict() if name.startswith("_optimizer_") else _copied(value, memo)
        made.param_groups = groups
        _set_rate(made, 1.0)  # a small or zero rate would hide differences
        common = {key: v for key, v in original.state.items() if not isinstance(key, torch.Tensor)}
        made.state = defaultdict(dict, _copied(common, memo))
        for (_, like), parameter in zip(self._examples, small, strict=True):
            state = original.state.get(like)
            if parameter is not None and state:
                small_state = {entry: _like(entry, v, like, parameter) for entry, v in state.items()}
                if all(v is not None for v in small_state.values()):
                    made.state[parameter] = small_state
        return made


def _like(entry: str, value: Any, like: nn.Parameter, parameter: nn.Parameter) -> Any:
    """A state entry from the constructor or earlier steps, for a small tensor; None if it cannot be made smaller."""
    if is_split(entry, value, like.shape):
        return torch.full_like(parameter, value.reshape(-1)[0].item()) if value.numel() else None
    if isinstance(value, torch.Tensor):
        return value.clone() if value.ndim == 0 else None
    return copy.deepcopy(value)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(lr := group.get("lr"), (int, float, torch.Tensor)):
            group["lr"] = torch.full_like(lr, rate) if isinstance(lr, torch.Tensor) else rate


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a file or a lock, say, which does not take part in the arithmetic
        return value


def _step(made: torch.optim.Optimizer, original: torch.optim.Optimizer, *closure: Any) -> None:
    own = vars(original).get("step")
    if isinstance(own, types.MethodType) and own.__self__ is original and not hasattr(own, "_wrapped_by_lr_sched"):
        own.__func__(made, *closure)
    else:
        type(made).step(made, *closure)
