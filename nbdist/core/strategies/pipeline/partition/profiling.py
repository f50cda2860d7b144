"""Profiles a traced forward node by node: value sizes, in-place writes, and the time of each node."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from nbdist.core.params.preserve_model import device_of, preserve_model
from nbdist.core.strategies.pipeline.partition.call_signature import leaves_of
from nbdist.core.strategies.pipeline.partition.effects import ReadAttributes
from nbdist.core.strategies.pipeline.partition.tracing import Trace
from nbdist.upstream.torch_private import storage_key

__all__ = ["ValueInfo", "examine", "measure"]

PASSES, PASSES_S = 8, 0.5  # measure at most so many forwards, or for so many seconds


@dataclass(frozen=True, kw_only=True)
class ValueInfo:
    """Information on the values of a graph, from one run.

    Args:
        bytes: Size of each tensor value.
        integers: Nodes whose value is a non-negative integer: a size.
        no_cut_ranges: Positions ``(first, last)`` with an in-place write in between: no cut before first + 1 ... last.
        written: The buffers that forward writes, but those of torch's own modules.
    """

    bytes: dict[fx.Node, int]
    integers: frozenset[fx.Node]
    no_cut_ranges: tuple[tuple[int, int], ...]
    written: tuple[torch.Tensor, ...]


def examine(trace: Trace, values: Sequence[torch.Tensor]) -> ValueInfo:
    """Run the graph once, saving all values, and inspect them. Local; the model is left unchanged.

    Args:
        trace: The traced forward.
        values: The tensors of a call.
    """
    tracker = _MemoryTracker(trace)
    with preserve_model(trace.model), torch.no_grad():
        tracker.run(*(value.clone() for value in values), enable_io_processing=False)
    env: dict[fx.Node, Any] = tracker.env
    _fold_devices(env)
    return ValueInfo(
        bytes={n: v.numel() * v.element_size() for n, v in env.items() if _plain(v)},
        integers=frozenset(n for n, v in env.items() if type(v) is int and v >= 0),
        no_cut_ranges=(*tracker.no_cut_ranges(), *_attributes_kept(trace)),
        written=tuple(tracker.written_buffers()),
    )


def measure(trace: Trace, values: Sequence[torch.Tensor]) -> dict[str, float]:
    """Measure the seconds of each node's forward, by name: the best of a few runs. Local.

    Times differ from rank to rank: rank 0 measures and broadcasts the cuts.
    """
    timer = _Timer(trace)
    start = time.perf_counter()
    with preserve_model(trace.model), torch.no_grad():
        for _ in range(PASSES):
            timer.run(*(value.clone() for value in values), enable_io_processing=False)
            if time.perf_counter() - start > PASSES_S:
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
        start = time.perf_counter()
        result = super().run_node(n)
        self._wait()
        seconds = time.perf_counter() - start
        if n in self.body:
            self.seconds[n.name] = min(seconds, self.seconds.get(n.name, seconds))
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _MemoryTracker(_Runner):
    """Records which memory each node uses and which it writes."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace, keep=True)  # freed memory would be used again, under the same address
        self.positions = {node: i for i, node in enumerate(trace.body)}
        persistent = [*trace.model.parameters(), *trace.model.buffers(), *trace.constants.values()]
        self.persistent = {storage_key(t) for t in _tensors(persistent)}
        self.buffers = {storage_key(t) for t in _tensors(list(trace.model.buffers()))}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.written: dict[int, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        position = self.positions.get(n, -1)
        inputs = list(_tensors([*(self.env[source] for source in n.all_input_nodes), *self._inside(n)]))
        before = [(t._version, t.clone() if storage_key(t) in self.buffers else None) for t in inputs]
        result = super().run_node(n)
        if n.op in ("get_attr", "output"):
            return result
        for tensor, (version, values) in zip(inputs, before, strict=True):
            # batch_norm writes its buffers without changing `_version`
            if tensor._version != version or (values is not None and not torch.equal(tensor, values)):
                self.written[storage_key(tensor)] = position
        for tensor in [*inputs, *_tensors(result)]:
            self.first.setdefault(storage_key(tensor), position)
            self.last[storage_key(tensor)] = position
        return result

    def no_cut_ranges(self) -> Iterator[tuple[int, int]]:
        """See `ValueInfo`.

        A value must not be sent to another stage before its last in-place write: one of the two stages would have the
        old value, and autograd forbids in-place writes to a leaf, which a received tensor is. A buffer that forward
        writes must be in one stage.
        """
        for memory, position in self.written.items():
            yield self.first[memory], self.last[memory] if memory in self.persistent else position

    def written_buffers(self) -> Iterator[torch.Tensor]:
        """See `ValueInfo`."""
        for module in self.trace.model.modules():
            if not type(module).__module__.startswith("torch.nn."):
                yield from (b for b in module.buffers(recurse=False) if storage_key(b) in self.written)

    def _inside(self, node: fx.Node) -> list[torch.Tensor]:
        return list(self.trace.used_by(node)) if node.op == "call_module" else []


def _fold_devices(env: dict[fx.Node, Any]) -> None:
    """Make devices constants: they are always the same on this rank, and no value that a cut lets pass."""
    same = {node: node for node in env}
    for node, value in env.items():
        if isinstance(value, torch.device):
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), {**same, node: value}.__getitem__)
            node.op, node.target, node.args, node.kwargs = "call_function", _nothing, (), {}  # it keeps its place


def _nothing() -> None:
    pass


def _attributes_kept(trace: Trace) -> Iterator[tuple[int, int]]:
    """No cuts between a child and the reading of its attributes, nor between two calls of one that counts its calls."""
    positions: dict[nn.Module, list[int]] = {}
    for i, node in enumerate(trace.body):
        reader = trace.value(str(node.target)) if node.op == "call_module" else None
        if isinstance(reader, ReadAttributes):
            yield i - 1, i
            for module in reader.counting:
                positions.setdefault(module, []).append(i)
    for calls in positions.values():
        yield calls[0] - 1, calls[-1]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in leaves_of(value) if _plain(leaf))


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided
