"""Which values cross from one stage to the next, and where a graph may be cut."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from nbdist.core.strategies.pipeline.partition.profiling import ValueInfo
from nbdist.core.strategies.pipeline.partition.tracing import Trace

__all__ = ["Crossings"]

BYTES_PER_S = 3e9  # between two ranks of a host
VALUE_S = 5e-6  # of each value, whatever its size


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """A trace, what is known of its values, and from there the places to cut.

    A cut at position c is before node c of the body.
    """

    trace: Trace
    facts: ValueInfo

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
        """Of each input and node of the body: the first and last cut that its value crosses, if first <= last."""
        ends = {node: i for i, node in enumerate([*self.body, self.trace.output])}
        begin = {**dict.fromkeys(self.trace.inputs, 0), **{node: i for i, node in enumerate(self.body)}}
        return {node: (i + 1, max((ends[user] for user in node.users), default=-1)) for node, i in begin.items()}

    @cached_property
    def cuts(self) -> list[int]:
        """Positions at which may be cut: what crosses are tensors, at least one, and sizes."""
        tensors = self._count([n in self.facts.bytes for n in self.spans])
        strange = self._count([n not in self.facts.bytes and n not in self.facts.integers for n in self.spans])
        walled = {c for first, last in self.facts.walls for c in range(first + 1, last + 1)}
        return [c for c in range(1, len(self.body)) if tensors[c] and not strange[c] and c not in walled]

    @cached_property
    def legal(self) -> frozenset[int]:
        """`cuts`, to look one up."""
        return frozenset(self.cuts)

    @cached_property
    def names(self) -> dict[int, str]:
        """Name of each parameter and buffer of the model by its id; tied ones have one, the first."""
        model = self.trace.model
        return {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}

    @cached_property
    def returned(self) -> list[str]:
        """Names of parameters and buffers that the model returns as they are."""
        sources = [n for n in self.trace.output.all_input_nodes if n.op == "get_attr"]
        found = [self.names.get(id(self.trace.value(str(n.target)))) for n in sources]
        return [name for name in found if name is not None]

    @cached_property
    def edges(self) -> list[float]:
        """Seconds that a cut at each position costs the stages beside it, on the scale of a forward.

        Forward and backward take three times a forward where values are computed, and twice where they are sent.
        """
        seconds = [2 / 3 * self.facts.bytes.get(n, 0) / BYTES_PER_S + VALUE_S for n in self.spans]
        return self._count(seconds)

    def crossing(self, cut: int) -> tuple[list[fx.Node], list[fx.Node]]:
        """The tensors, and the sizes, that cross a cut."""
        live = [node for node, (first, last) in self.spans.items() if first <= cut <= last]
        sizes = [node for node in live if node in self.facts.integers]
        return [node for node in live if node not in self.facts.integers], sizes

    def held(self, node: fx.Node) -> list[str]:
        """Names of the parameters and buffers that a node of the body works with."""
        return [self.names[id(t)] for t in self.trace.held(node) if id(t) in self.names]

    def title(self, position: int, end: int) -> str:
        """The first place that has a name on the way from one position to another, either way; else an operation's."""
        step = 1 if end > position else -1
        return next(filter(None, map(self.place, range(position, end, step))), self.body[position].name)

    def place(self, position: int) -> str:
        """What a user calls the place of a node: the path of its module, or "" in the model's own forward."""
        node = self.body[position]
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        path = str(next(reversed(stack.values()))[0])
        return path.removeprefix("model.") if path.startswith("model.") else ""

    def _count(self, weights: list[float] | list[bool]) -> list[float]:
        """At each position, the sum over the values that cross it."""
        changes = [0.0] * (len(self.body) + 2)
        for (first, last), weight in zip(self.spans.values(), weights, strict=True):
            if first <= last:
                changes[first] += weight
                changes[last + 1] -= weight
        return list(itertools.accumulate(changes))[: len(self.body)]
