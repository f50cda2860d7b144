"""Splits a model into pipeline stages: chooses balanced cuts, and builds the module of each stage for a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nbdist.core.params.preserve_model import device_of, preserve_model
from nbdist.core.strategies.pipeline.partition.build_stage import build
from nbdist.core.strategies.pipeline.partition.call_signature import Call
from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.cut_points import cut_at_names, cut_at_nodes, cut_like
from nbdist.core.strategies.pipeline.partition.effects import Effect, effects_of
from nbdist.core.strategies.pipeline.partition.profiling import examine, measure
from nbdist.core.strategies.pipeline.partition.tracing import KINDS, Trace, cannot_split, trace_forward
from nbdist.core.strategies.pipeline.partition.verify import ForwardResult, verify_trace
from nbdist.errors import NbdistError, PlanError
from nbdist.plan.balance import partition
from nbdist.upstream.torch_private import storage_key

__all__ = ["Split", "StageInfo", "split"]

BALANCED = 1.2  # slowest stage over the mean: up to here, no finer trace is tried


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """One stage, for display.

    Args:
        stage: Its index.
        first: The first module or operation.
        last: The last one.
        seconds: Measured time of a forward of the example batch.
        parameters: Number of elements of its parameters.
    """

    stage: int
    first: str
    last: str
    seconds: float
    parameters: int


class Split:
    """A module cut into stages. Made by `split`.

    Args:
        crossings: The traced forward of the example.
        bounds: The position at which each stage begins, and the end.
        costs: Measured seconds by node.
        seconds: Measured seconds by stage, without `costs` if another rank measured.
        effects: The attributes that a forward changes beside its output.
    """

    def __init__(
        self,
        crossings: Crossings,
        bounds: Sequence[int],
        costs: dict[str, float],
        seconds: Sequence[float] | None = None,
        effects: Sequence[Effect] = (),
    ) -> None:
        self.effects = tuple(effects)
        self.model = crossings.trace.model
        self.crossings = crossings
        self.bounds = list(bounds)
        self.costs = costs
        self.seconds = [_total(crossings, costs, a, b) for a, b in self._ranges()] if seconds is None else list(seconds)
        self.holders = self._holders()
        self._modules = list(self.model.modules())
        self._written = {storage_key(buffer) for buffer in crossings.value_info.written}
        self._traces: list[tuple[Crossings, list[int]]] = [(crossings, self.bounds)]
        self._stages: dict[tuple[Call, tuple[bool, ...]], tuple[Callable[[int], nn.Module], dict[int, nn.Module]]] = {}

    @property
    def infos(self) -> list[StageInfo]:
        """The stages, for display."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        return [
            StageInfo(
                stage=i, first=self.crossings.title(a, b), last=self.crossings.title(b - 1, a - 1),
                seconds=self.seconds[i],
                parameters=sum(size for name, size in sizes.items() if i in self.holders[name]),
            )
            for i, (a, b) in enumerate(self._ranges())
        ]  # fmt: skip

    @property
    def written(self) -> dict[str, torch.Tensor]:
        """The buffers that the forward of the example writes, but those of torch's own modules."""
        return {self.crossings.names[id(buffer)]: buffer for buffer in self.crossings.value_info.written}

    @property
    def bytes_crossing(self) -> list[int]:
        """Bytes of the tensors of the example that cross from each stage to the next."""
        info = self.crossings.value_info
        return [sum(info.bytes[node] for node in self.crossings.crossing(cut)[0]) for cut in self.bounds[1:-1]]

    @property
    def cuts(self) -> dict[str, Any]:
        """The cuts as JSON-able data, with which another rank makes the same stages."""
        firsts = [self.crossings.body[position].name for position in self.bounds[1:-1]]
        effects = [asdict(effect) for effect in self.effects]
        return {"kind": self.crossings.trace.kind, "firsts": firsts, "seconds": self.seconds, "effects": effects}

    @property
    def imbalance(self) -> float:
        """The slowest stage's time over the mean: 1 is perfect."""
        return max(self.seconds) * len(self.seconds) / (sum(self.seconds) or 1.0)

    def into(self, parts: int) -> Split:
        """Cut the same traced model into another number of stages. Local, cheap; needs the costs.

        Raises:
            PlanError: There are too few places to cut.
        """
        bounds = _bounds(self.crossings, self.costs, parts, 0, len(self.crossings.body))
        return Split(self.crossings, bounds, self.costs, effects=self.effects)

    def refine(self, parts: int) -> Split:
        """Cut each stage i into stages i * parts ... (i + 1) * parts - 1.

        Raises:
            PlanError: A stage has too few places to cut.
        """
        bounds = [0]
        for start, stop in self._ranges():
            bounds += _bounds(self.crossings, self.costs, parts, start, stop)[1:]
        return Split(self.crossings, bounds, self.costs, effects=self.effects)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Context for the forward of a stage in a schedule. Local.

        A stage may turn gradients off, and fail then. Between a forward and its backward comes another forward, which
        may write to a buffer: autograd saves copies of those.
        """
        keys = self._written

        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
            saved = tensor.clone() if storage_key(tensor) in keys else tensor
            return saved, saved._version

        def unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError("a tensor that backward needs was modified by an in-place operation.")
            return tensor

        with torch.set_grad_enabled(torch.is_grad_enabled()):
            if not keys or not torch.is_grad_enabled():
                yield
                return
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield

    def stages_of(self, module: nn.Module) -> list[int]:
        """The stages that call a module, or one that it is in."""
        return [
            stage
            for stage, (start, stop) in enumerate(self._ranges())
            for node in self.crossings.body[start:stop]
            if node.op == "call_module" and module in set(self.crossings.trace.value(str(node.target)).modules())
        ]

    def stage(self, index: int, call: Call) -> nn.Module:
        """The module of one stage for a call, in the model's present train and eval modes. Local; cached.

        A new signature or mode may need another trace, which takes up to seconds.

        Args:
            index: The stage.
            call: The signature of the call.

        Returns:
            ``module(*values) -> tuple``. The first takes the call's tensors, each other one the tuple that the
            previous stage returned; the last returns the model's output. A stage may return an input unchanged.

        Raises:
            TaskError: In this mode, or for this call, the model cannot be cut in the same way.
        """
        key = (call, tuple(m.training for m in self._modules))
        if key not in self._stages:
            crossings, bounds = self._trace_for(*key)
            self._stages[key] = (lambda i: build(crossings, bounds[i], bounds[i + 1])), {}
        make, made = self._stages[key]
        if index not in made:
            made[index] = make(index)
        return made[index]

    def _trace_for(self, call: Call, modes: tuple[bool, ...]) -> tuple[Crossings, list[int]]:
        """A trace that fits this call, with the same cuts."""
        for crossings, bounds in self._traces:
            if crossings.trace.fits(call, modes):
                return crossings, bounds
        values = call.zeros(device_of(self.model))
        trace = trace_forward(self.model, call, self.crossings.trace.kind, self.effects)
        crossings = Crossings(trace=trace, value_info=examine(trace, values))
        bounds = cut_like(
            crossings, [self.crossings.body[c].name for c in self.bounds[1:-1]], self.holders, self._unused
        )
        self._traces.append((crossings, bounds))
        self._written |= {storage_key(buffer) for buffer in crossings.value_info.written}
        return crossings, bounds

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def _holders(self) -> dict[str, tuple[int, ...]]:
        """The stages that use each parameter and buffer; also sets `_unused`, those that no stage uses."""
        used: dict[str, set[int]] = {name: set() for name in self.crossings.names.values()}
        for stage, (start, stop) in enumerate(self._ranges()):
            for node in self.crossings.body[start:stop]:
                for name in self.crossings.used_by(node):
                    used[name].add(stage)
        for name in self.crossings.returned:  # a parameter that the model returns unchanged
            used[name].add(len(self.bounds) - 2)
        self._unused = {name for name, stages in used.items() if not stages}
        return {name: tuple(sorted(stages)) or (0,) for name, stages in used.items()}


def split(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    stages: int = 2,
    *,
    at: Sequence[str] = (),
    cuts: dict[str, Any] | None = None,
    kinds: Sequence[str] = KINDS,
) -> Split:
    """Cut a module into stages that take the same time. Local; the model is left unchanged.

    The forward is traced on the example, verified against the model (outputs and gradients), measured, and cut so that
    the slowest stage is as fast as possible. Measured times differ from rank to rank: one rank must split and send its
    `Split.cuts` to the others.

    Args:
        model: Any module, with its parameters on one device, in the modes in which it is to be trained.
        args: Arguments of an example call: a small batch of real data, two samples or more.
        kwargs: Its keyword arguments.
        stages: Number of stages.
        at: Names of modules or parameters, in order, with which the stages after the first begin; instead of balancing.
        cuts: `Split.cuts` of another rank.
        kinds: How the forward may be traced, see `trace_forward`; the first that works and is balanced is used.

    Raises:
        PlanError: There are too few places to cut, or `at` does not fit.
        TaskError: The forward cannot be traced; the message names the statement.
    """
    call, values = Call.of(args, kwargs or {})
    if at and len(at) != stages - 1:
        raise PlanError(f"{stages} stages are cut at {stages - 1} places, but at= names {len(at)}: {', '.join(at)}.")
    if cuts is not None:
        with preserve_model(model), torch.no_grad():
            # The first forward may initialize state that a trace reads; the rank that measured has run one too.
            _call_model(model, call, [value.clone() for value in values])
        effects = tuple(Effect(**effect) for effect in cuts["effects"])
        crossings = _prepare(model, call, values, cuts["kind"], effects)
        return Split(crossings, cut_at_nodes(crossings, cuts["firsts"]), {}, cuts["seconds"], effects)
    effects = effects_of(model, lambda: _call_model(model, call, [value.clone() for value in values]))
    expected = ForwardResult.of(model, lambda *tensors: _call_model(model, call, tensors), values, effects)
    best: Split | None = None
    errors: list[NbdistError] = []
    for kind in kinds:
        try:
            crossings = _prepare(model, call, values, kind, effects)
            verify_trace(crossings, values, expected, effects)
            costs = measure(crossings.trace, values)
            bounds = cut_at_names(crossings, at) if at else _bounds(crossings, costs, stages, 0, len(crossings.body))
            found = Split(crossings, bounds, costs, effects=effects)
        except NbdistError as error:
            errors.append(error)
            continue
        except Exception as error:  # a trace that does not run
            errors.append(cannot_split(model, "", error))
            continue
        if best is None or found.imbalance < best.imbalance:
            best = found
        if at or best.imbalance <= BALANCED or not _has_composite_leaf(crossings.trace):
            break
    if best is None:
        raise _best_error(errors)
    return best


def _call_model(model: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    args, kwargs = call.arguments(tensors)
    return model(*args, **kwargs)


def _prepare(
    model: nn.Module, call: Call, values: Sequence[torch.Tensor], kind: str, effects: Sequence[Effect]
) -> Crossings:
    trace = trace_forward(model, call, kind, effects)
    return Crossings(trace=trace, value_info=examine(trace, values))


def _bounds(crossings: Crossings, costs: dict[str, float], parts: int, start: int, stop: int) -> list[int]:
    possible = 1 + sum(start < c < stop for c in crossings.cuts)
    if parts > possible:
        what = type(crossings.trace.model).__name__ if (start, stop) == (0, len(crossings.body)) else "a stage"
        raise PlanError(f"{what} cannot be cut into {parts} stages: there are places to cut for {possible} at most.")
    seconds = [costs[node.name] for node in crossings.body[start:stop]]
    inside = partition(seconds, parts, crossings.edges[start:stop], [c - start for c in crossings.cuts])
    return [start, *(start + c for c in inside), stop]


def _total(crossings: Crossings, costs: dict[str, float], start: int, stop: int) -> float:
    return sum(costs[node.name] for node in crossings.body[start:stop])


def _has_composite_leaf(trace: Trace) -> bool:
    """Whether a module that the trace calls as a whole has children, so that a finer trace could cut inside it."""
    called = (trace.value(str(n.target)) for n in trace.body if n.op == "call_module")
    return any(True for module in called for _ in module.children())


def _best_error(errors: list[NbdistError]) -> NbdistError:
    """The most useful of the errors of all kinds: too few places to cut, else the last one's."""
    too_few = [error for error in errors if isinstance(error, PlanError)]
    return (too_few or errors)[-1]
