"""Running a recorded forward node by node: what its values are, what writes in place, and how long each node takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nbdist.core.params.preserve import device_of, untouched
from nbdist.core.strategies.pipeline.partition.call import leaves_of
from nbdist.core.strategies.pipeline.partition.tracing import Trace

__all__ = ["ValueInfo", "examine", "measure"]

PASSES, PASSES_S = 8, 0.5  # runs of the model for a measurement: so many, or for so long


@dataclass(frozen=True, kw_only=True)
class ValueInfo:
    """What one run of a graph shows of its values.

    Args:
        bytes: Size of each value that is a tensor.
        integers: Nodes whose value is an integer and not negative: a size.
        walls: Pairs of positions ``(first, last)`` with in-place writing in between: no cut before first + 1 ... last.
    """

    bytes: dict[fx.Node, int]
    integers: frozenset[fx.Node]
    walls: tuple[tuple[int, int], ...]


def examine(trace: Trace, values: Sequence[torch.Tensor]) -> ValueInfo:
    """Run the graph once, with all values kept, and look at them. Local; the model is left as it was.

    Args:
        trace: The recorded forward.
        values: The tensors of a call.
    """
    watcher = _Watcher(trace)
    with untouched(trace.model), torch.no_grad():
        watcher.run(*(value.clone() for value in values), enable_io_processing=False)
    env: dict[fx.Node, Any] = watcher.env
    return ValueInfo(
        bytes={n: v.numel() * v.element_size() for n, v in env.items() if _plain(v)},
        integers=frozenset(n for n, v in env.items() if type(v) is int and v >= 0),
        walls=tuple(watcher.walls()),
    )


def measure(trace: Trace, values: Sequence[torch.Tensor]) -> dict[str, float]:
    """Measure the seconds of forward of each node, by name: the best of a few runs. Local.

    The numbers differ from rank to rank: one measures, and tells the others the cuts.
    """
    timer = _Timer(trace)
    began = time.perf_counter()
    with untouched(trace.model), torch.no_grad():
        for _ in range(PASSES):
            timer.run(*(value.clone() for value in values), enable_io_processing=False)
            if time.perf_counter() - began > PASSES_S:
                break
    return timer.seconds


class _Runner(fx.Interpreter):
    """Runs a trace's graph on the user's own modules and tensors."""

    def __init__(self, trace: Trace, keep: bool) -> None:
        super().__init__(trace.model, garbage_collect_values=not keep, graph=trace.graph)
        self.trace = trace

    def fetch_attr(self, target: str) -> Any:
        """See `fx.Interpreter`."""
        return self.trace.value(target)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See `fx.Interpreter`."""
        return self.trace.value(target)(*args, **kwargs)


class _Timer(_Runner):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace, keep=False)
        self.seconds: dict[str, float] = {}
        self.body = set(trace.body)
        self.device = device_of(trace.model)

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        self._wait()
        began = time.perf_counter()
        result = super().run_node(n)
        self._wait()
        seconds = time.perf_counter() - began
        if n in self.body:
            self.seconds[n.name] = min(seconds, self.seconds.get(n.name, seconds))
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Watcher(_Runner):
    """Notes which memory each node touches and which it writes."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace, keep=True)  # so that no memory is used twice
        self.positions = {node: i for i, node in enumerate(trace.body)}
        lasting = [*trace.model.parameters(), *trace.model.buffers(), *trace.constants.values()]
        self.lasting = {_memory(t) for t in _tensors(lasting)}
        self.buffers = {_memory(t) for t in _tensors(list(trace.model.buffers()))}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.written: dict[int, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        position = self.positions.get(n, -1)
        inputs = list(_tensors([*(self.env[source] for source in n.all_input_nodes), *self._inside(n)]))
        before = [(t._version, t.clone() if _memory(t) in self.buffers else None) for t in inputs]
        result = super().run_node(n)
        if n.op in ("get_attr", "output"):
            return result
        for tensor, (version, values) in zip(inputs, before, strict=True):
            # batch_norm does not tell that it writes its buffers
            if tensor._version != version or (values is not None and not torch.equal(tensor, values)):
                self.written[_memory(tensor)] = position
        for tensor in [*inputs, *_tensors(result)]:
            self.first.setdefault(_memory(tensor), position)
            self.last[_memory(tensor)] = position
        return result

    def walls(self) -> Iterator[tuple[int, int]]:
        """See `ValueInfo`.

        A value must not be on its way to another stage while it is still written: that stage, or this one, would
        see the old one; and what a stage receives is a leaf, on which autograd allows no writing. A buffer that
        forward writes lives in one stage.
        """
        for memory, position in self.written.items():
            yield self.first[memory], self.last[memory] if memory in self.lasting else position

    def _inside(self, node: fx.Node) -> list[torch.Tensor]:
        return list(self.trace.held(node)) if node.op == "call_module" else []


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in leaves_of(value) if _plain(leaf))


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
