"""Cutting a module into stages: where, and what each stage is for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbdist.core.params.preserve import device_of, untouched
from nbdist.core.strategies.pipeline.partition.build_stage import build
from nbdist.core.strategies.pipeline.partition.call import Call
from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.cut_points import follow, named, place_at
from nbdist.core.strategies.pipeline.partition.profiling import examine, measure
from nbdist.core.strategies.pipeline.partition.tracing import KINDS, Trace, record
from nbdist.core.strategies.pipeline.partition.verify import Answer, check_agrees
from nbdist.errors import NbdistError, PlanError
from nbdist.plan.partition import partition

__all__ = ["Split", "StageInfo", "split"]

BALANCED = 1.2  # largest stage over mean, up to which no better cut is looked for


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """One stage, for people.

    Args:
        stage: Its index.
        first: Where it begins: the name of a module or an operation.
        last: Where it ends.
        seconds: Measured forward of the example batch.
        parameters: Number of elements of the parameters it uses.
    """

    stage: int
    first: str
    last: str
    seconds: float
    parameters: int


class Split:
    """A module cut into stages. Made by `split`.

    Args:
        flow: The recorded forward of the example.
        bounds: Where each stage begins, and the end.
        costs: Measured seconds by node.
        seconds: Measured seconds by stage, if there are no `costs` because another rank measured.
    """

    def __init__(
        self, flow: Crossings, bounds: Sequence[int], costs: dict[str, float], seconds: Sequence[float] | None = None
    ) -> None:
        self.model = flow.trace.model
        self.flow = flow
        self.bounds = list(bounds)
        self.costs = costs
        self.seconds = [_total(flow, costs, a, b) for a, b in self._parts()] if seconds is None else list(seconds)
        self.holders = self._holders()
        self._modules = list(self.model.modules())
        self._known: list[tuple[Crossings, list[int]]] = [(flow, self.bounds)]
        self._stages: dict[tuple[Call, tuple[bool, ...]], tuple[Callable[[int], nn.Module], dict[int, nn.Module]]] = {}

    @property
    def infos(self) -> list[StageInfo]:
        """The stages, for people."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        return [
            StageInfo(
                stage=i, first=self.flow.title(a, b), last=self.flow.title(b - 1, a - 1), seconds=self.seconds[i],
                parameters=sum(size for name, size in sizes.items() if i in self.holders[name]),
            )
            for i, (a, b) in enumerate(self._parts())
        ]  # fmt: skip

    @property
    def cuts(self) -> dict[str, Any]:
        """The cut, JSON-able: what another rank needs to cut the same model in the same way."""
        firsts = [self.flow.body[position].name for position in self.bounds[1:-1]]
        return {"kind": self.flow.trace.kind, "firsts": firsts, "seconds": self.seconds}

    @property
    def imbalance(self) -> float:
        """The slowest stage's time over the mean: 1 is perfect."""
        return max(self.seconds) * len(self.seconds) / (sum(self.seconds) or 1.0)

    def into(self, parts: int) -> Split:
        """Cut the same recorded model into another number of stages. Local, cheap; needs the costs.

        Raises:
            PlanError: There are too few places to cut.
        """
        return Split(self.flow, _bounds(self.flow, self.costs, parts, 0, len(self.flow.body)), self.costs)

    def refine(self, parts: int) -> Split:
        """Cut each stage further: stages i * parts ... (i + 1) * parts - 1 are what stage i was.

        Raises:
            PlanError: A stage has too few places to cut.
        """
        bounds = [0]
        for start, stop in self._parts():
            bounds += _bounds(self.flow, self.costs, parts, start, stop)[1:]
        return Split(self.flow, bounds, self.costs)

    def stage(self, index: int, call: Call) -> nn.Module:
        """The module of one stage for a call, in the model's present train and eval modes. Local; kept.

        The stage of a signature or mode not seen before may need to be recorded: up to seconds.

        Args:
            index: Of the stage.
            call: How the model is called.

        Returns:
            ``module(*values) -> tuple``. The first takes the call's tensors, each other one exactly what the one
            before returned; the last returns the model's output. A tensor may be passed on as it came.

        Raises:
            TaskError: In this mode, or for this call, the model cannot be cut in the same way.
        """
        key = (call, tuple(m.training for m in self._modules))
        if key not in self._stages:
            flow, bounds = self._recorded(*key)
            self._stages[key] = (lambda i: build(flow, bounds[i], bounds[i + 1])), {}
        make, made = self._stages[key]
        if index not in made:
            made[index] = make(index)
        return made[index]

    def _recorded(self, call: Call, modes: tuple[bool, ...]) -> tuple[Crossings, list[int]]:
        """A recorded forward that serves this call, cut where this one is."""
        for flow, bounds in self._known:
            if flow.trace.fits(call, modes):
                return flow, bounds
        values = call.zeros(device_of(self.model))
        trace = record(self.model, call, self.flow.trace.kind)
        flow = Crossings(trace=trace, facts=examine(trace, values))
        bounds = follow(flow, [self.flow.body[c].name for c in self.bounds[1:-1]], self.holders, self._idle)
        self._known.append((flow, bounds))
        return flow, bounds

    def _parts(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def _holders(self) -> dict[str, tuple[int, ...]]:
        """See `split`; notes as idle what no stage uses."""
        used: dict[str, set[int]] = {name: set() for name in self.flow.names.values()}
        for stage, (start, stop) in enumerate(self._parts()):
            for node in self.flow.body[start:stop]:
                for name in self.flow.held(node):
                    used[name].add(stage)
        for name in self.flow.returned:  # a parameter that the model returns as it is
            used[name].add(len(self.bounds) - 2)
        self._idle = {name for name, stages in used.items() if not stages}
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
    """Cut a module into stages that take the same time. Local; the model is left as it was.

    The forward is recorded and measured on the example, checked to compute what the model does, gradients included,
    and cut where the slowest stage is fastest. Measured times differ from rank to rank: let one rank split and give
    its `Split.cuts` to the others.

    Args:
        model: Any module, with its parameters on one device, in the modes in which it is to be trained.
        args: Arguments of an example call: a small batch of real data, two samples or more.
        kwargs: Its keyword arguments.
        stages: Number of stages.
        at: Names of modules or parameters, in order; each is the first of a stage. In place of measuring.
        cuts: Where another rank has cut.
        kinds: How the forward may be recorded, see `record`; the first that serves is taken.

    Raises:
        PlanError: There are too few places to cut, or `at` does not fit.
        TaskError: The forward cannot be recorded; the message names the statement.
    """
    call, values = Call.of(args, kwargs or {})
    if at and len(at) != stages - 1:
        raise PlanError(f"{stages} stages are cut at {stages - 1} places, but at= names {len(at)}: {', '.join(at)}.")
    if cuts is not None:
        with untouched(model), torch.no_grad():
            # A first forward may settle what the next ones find, as it did on the rank that measured.
            _called(model, call, [value.clone() for value in values])
        flow = _prepare(model, call, values, cuts["kind"])
        return Split(flow, named(flow, cuts["firsts"]), {}, cuts["seconds"])
    expected = Answer.of(model, lambda *tensors: _called(model, call, tensors), values)
    best: Split | None = None
    errors: list[NbdistError] = []
    for kind in kinds:
        try:
            flow = _prepare(model, call, values, kind)
            check_agrees(flow, values, expected)
            costs = measure(flow.trace, values)
            bounds = place_at(flow, at) if at else _bounds(flow, costs, stages, 0, len(flow.body))
            found = Split(flow, bounds, costs)
        except NbdistError as error:
            errors.append(error)
            continue
        if best is None or found.imbalance < best.imbalance:
            best = found
        if at or best.imbalance <= BALANCED or not _coarse(flow.trace):
            break
    if best is None:
        raise _most_telling(errors)
    return best


def _called(model: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    args, kwargs = call.arguments(tensors)
    return model(*args, **kwargs)


def _prepare(model: nn.Module, call: Call, values: Sequence[torch.Tensor], kind: str) -> Crossings:
    trace = record(model, call, kind)
    return Crossings(trace=trace, facts=examine(trace, values))


def _bounds(flow: Crossings, costs: dict[str, float], parts: int, start: int, stop: int) -> list[int]:
    possible = 1 + sum(start < c < stop for c in flow.cuts)
    if parts > possible:
        what = type(flow.trace.model).__name__ if (start, stop) == (0, len(flow.body)) else "a stage"
        raise PlanError(f"{what} cannot be cut into {parts} stages: there are places to cut for {possible} at most.")
    seconds = [costs[node.name] for node in flow.body[start:stop]]
    inside = partition(seconds, parts, flow.edges[start:stop], [c - start for c in flow.cuts])
    return [start, *(start + c for c in inside), stop]


def _total(flow: Crossings, costs: dict[str, float], start: int, stop: int) -> float:
    return sum(costs[node.name] for node in flow.body[start:stop])


def _coarse(trace: Trace) -> bool:
    """Whether some module that has stayed whole is made of others."""
    called = (trace.value(str(n.target)) for n in trace.body if n.op == "call_module")
    return any(True for module in called for _ in module.children())


def _most_telling(errors: list[NbdistError]) -> NbdistError:
    """Of why each kind failed: that there are too few places to cut, else what stood in the way of the last."""
    too_few = [error for error in errors if isinstance(error, PlanError)]
    return (too_few or errors)[-1]
