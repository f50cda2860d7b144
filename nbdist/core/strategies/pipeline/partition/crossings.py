"""Which values cross each possible pipeline cut, where a graph may be cut, and what a cut costs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from nbdist.core.strategies.pipeline.partition.profiling import ValueInfo
from nbdist.core.strategies.pipeline.partition.tracing import Trace

__all__ = ["Crossings"]

BYTES_PER_S = 3e9  # bandwidth between two ranks of a host
VALUE_S = 5e-6  # latency of each value


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """A trace with information on its values; derives the places to cut.

    A cut at position c is before node c of the body.
    """

    trace: Trace
    value_info: ValueInfo

    @cached_property
    def body(self) -> list[fx.Node]:
        """The nodes that compute."""
        return self.trace.body

    @cached_property
    def positions(self) -> dict[str, int]:
        """Position of each node of the body, by name."""
        return {node.name: i for i, node in enumerate(self.body)}

    @cached_property
    def spans(self) -> dict[fx.Node, tuple[int, int]]:
        """For each input and node of the body: the first and last cut that its value crosses, if first <= last."""
        ends = {node: i for i, node in enumerate([*self.body, self.trace.output])}
        begin = {**dict.fromkeys(self.trace.inputs, 0), **{node: i for i, node in enumerate(self.body)}}
        return {node: (i + 1, max((ends[user] for user in node.users), default=-1)) for node, i in begin.items()}

    @cached_property
    def cuts(self) -> list[int]:
        """Positions where a cut is possible: only tensors, at least one, and sizes cross it."""
        tensors = self._sum_crossing([n in self.value_info.bytes for n in self.spans])
        other = self._sum_crossing(
            [n not in self.value_info.bytes and n not in self.value_info.integers for n in self.spans]
        )
        forbidden = {c for first, last in self.value_info.no_cut_ranges for c in range(first + 1, last + 1)}
        return [c for c in range(1, len(self.body)) if tensors[c] and not other[c] and c not in forbidden]

    @cached_property
    def cut_set(self) -> frozenset[int]:
        """`cuts` as a set."""
        return frozenset(self.cuts)

    @cached_property
    def names(self) -> dict[int, str]:
        """Name of each parameter and buffer of the model by its id; a tied one has its first name."""
        model = self.trace.model
        return {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}

    @cached_property
    def returned(self) -> list[str]:
        """Names of parameters and buffers that the model returns unchanged."""
        sources = [n for n in self.trace.output.all_input_nodes if n.op == "get_attr"]
        found = [self.names.get(id(self.trace.value(str(n.target)))) for n in sources]
        return [name for name in found if name is not None]

    @cached_property
    def edges(self) -> list[float]:
        """Seconds that a cut at each position adds to the stages beside it, on the scale of a forward.

        Computing takes three times a forward in forward and backward, sending only twice: hence 2 / 3.
        """
        seconds = [2 / 3 * self.value_info.bytes.get(n, 0) / BYTES_PER_S + VALUE_S for n in self.spans]
        return self._sum_crossing(seconds)

    def crossing(self, cut: int) -> tuple[list[fx.Node], list[fx.Node]]:
        """The tensors, and the sizes, that cross a cut."""
        live = [node for node, (first, last) in self.spans.items() if first <= cut <= last]
        sizes = [node for node in live if node in self.value_info.integers]
        return [node for node in live if node not in self.value_info.integers], sizes

    def used_by(self, node: fx.Node) -> list[str]:
        """Names of the parameters and buffers that a node of the body uses."""
        return [self.names[id(t)] for t in self.trace.used_by(node) if id(t) in self.names]

    def title(self, position: int, end: int) -> str:
        """The first module path from one position to another, in either direction; else the operation's name."""
        step = 1 if end > position else -1
        return next(filter(None, map(self.place, range(position, end, step))), self.body[position].name)

    def place(self, position: int) -> str:
        """The path of the module that a node belongs to; "" in the model's own forward."""
        node = self.body[position]
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        path = str(next(reversed(stack.values()))[0])
        return path.removeprefix("model.") if path.startswith("model.") else ""

    def _sum_crossing(self, weights: list[float] | list[bool]) -> list[float]:
        """At each position, the sum over the values that cross it."""
        changes = [0.0] * (len(self.body) + 2)
        for (first, last), weight in zip(self.spans.values(), weights, strict=True):
            if first <= last:
                changes[first] += weight
                changes[last + 1] -= weight
        return list(itertools.accumulate(changes))[: len(self.body)]
