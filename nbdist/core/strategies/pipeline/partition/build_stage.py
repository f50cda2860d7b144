"""Making the module of one stage out of a part of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from nbdist.core.strategies.pipeline.partition.crossings import Crossings

__all__ = ["build"]

OUTPUT = "nbdist_output"


def build(flow: Crossings, start: int, stop: int) -> fx.GraphModule:
    """Make a module of the nodes from `start` to `stop` of the body. Local.

    It holds the user's own parameters, buffers and modules, under the user's names. It takes what crosses the cut at
    `start` and returns the tuple of what crosses the one at `stop`; the first takes the call's tensors, the last
    returns the model's output. Sizes cross as the shape of one tensor without elements.
    """
    return _Builder(flow).build(start, stop)


class _Builder:
    def __init__(self, flow: Crossings) -> None:
        self.flow = flow
        self.trace = flow.trace
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}  # by the node of the whole graph
        self.parts: dict[str, Any] = {}  # what stands at the top of the module

    def build(self, start: int, stop: int) -> fx.GraphModule:
        self._receive(start)
        for node in self.flow.body[start:stop]:
            self.new[node] = self.graph.node_copy(node, self._read)
            if node.op == "call_module":
                self.new[node].target = self._held(str(node.target))
        if stop == len(self.flow.body):
            self._return()
        else:
            self._send(stop)
        root = nn.Module()
        for name, value in self.parts.items():
            setattr(root, name, value)
        root.training = self.trace.model.training
        return fx.GraphModule(root, self.graph, class_name=f"{type(self.trace.model).__name__}Stage")

    def _receive(self, start: int) -> None:
        tensors, sizes = self.flow.crossing(start) if start else (self.trace.inputs, [])
        for node in tensors:
            self.new[node] = self.graph.placeholder(node.name)
        if sizes:
            carrier = self.graph.placeholder("sizes")
            for i, node in enumerate(sizes):
                self.new[node] = self.graph.call_method("size", (carrier, i))

    def _send(self, stop: int) -> None:
        tensors, sizes = self.flow.crossing(stop)
        values = [self._read(node) for node in tensors]
        if sizes:  # a shape needs no copy from a device, unlike a value
            shape: Any = (*(self._read(node) for node in sizes), 0)
            values.append(self.graph.call_method("new_empty", (values[0], shape), {"dtype": torch.uint8}))
        self.graph.output(tuple(values))

    def _return(self) -> None:
        self.parts[OUTPUT] = self.trace.form
        leaves: Any = fx.node.map_arg(self.trace.output.args[0], self._read)
        self.graph.output(self.graph.call_module(OUTPUT, tuple(leaves)))

    def _read(self, node: fx.Node) -> fx.Node:
        if node not in self.new:  # only what lasts is read where it is used
            self.new[node] = self.graph.create_node("get_attr", self._held(str(node.target)), name=node.name)
        return self.new[node]

    def _held(self, target: str) -> str:
        """Put what the user calls `target` into the module and return its name there."""
        top, *rest = target.split(".")
        name = f"{top}_" if hasattr(fx.GraphModule, top) else top  # a GraphModule has a `graph` and a `code` already
        self.parts.setdefault(name, self.trace.value(top))
        return ".".join([name, *rest])
