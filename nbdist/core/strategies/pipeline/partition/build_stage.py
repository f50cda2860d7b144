"""Builds the GraphModule of one pipeline stage from a range of the traced graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from nbdist.core.strategies.pipeline.partition.call_signature import OutputStructure
from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.fx_tracer import NO_GRAD

__all__ = ["build", "output_structure"]

OUTPUT = "nbdist_output"


def set_grad_enabled(mode: bool) -> None:
    """``torch.set_grad_enabled`` as a function of a graph, which lasts beyond the statement."""
    torch.set_grad_enabled(mode)


def build(crossings: Crossings, start: int, stop: int) -> fx.GraphModule:
    """Make a module of the nodes `start` to `stop` of the body. Local.

    It holds the user's own parameters, buffers and modules, under their names. It takes the values that cross the cut
    at `start` and returns the tuple of those that cross the cut at `stop`. The first stage takes the call's tensors,
    the last returns the model's output. Sizes are passed as the shape of one tensor without elements.
    """
    return _Builder(crossings).build(start, stop)


def output_structure(stage: nn.Module) -> OutputStructure:
    """What makes the model's output in the last stage. Local."""
    made: OutputStructure = getattr(stage, OUTPUT)
    return made


class _Builder:
    def __init__(self, crossings: Crossings) -> None:
        self.crossings = crossings
        self.trace = crossings.trace
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}  # node of the whole graph -> node of the stage
        self.parts: dict[str, Any] = {}  # attributes of the stage's module
        self.mode_before: fx.Node | None = None  # in a part without gradients: whether they were on before it

    def build(self, start: int, stop: int) -> fx.GraphModule:
        self._receive(start)
        for node in self.crossings.body[start:stop]:
            self._set_grad_mode(bool(node.meta.get(NO_GRAD)))
            self.new[node] = self.graph.node_copy(node, self._read)
            if node.op == "call_module":
                self.new[node].target = self._held(str(node.target))
        self._set_grad_mode(False)
        if stop == len(self.crossings.body):
            self._return()
        else:
            self._send(stop)
        root = nn.Module()
        for name, value in self.parts.items():
            setattr(root, name, value)
        root.training = self.trace.model.training
        return fx.GraphModule(root, self.graph, class_name=f"{type(self.trace.model).__name__}Stage")

    def _set_grad_mode(self, off: bool) -> None:
        """Add what turns gradients off, or on again if they were on before."""
        if off and self.mode_before is None:
            self.mode_before = self.graph.call_function(torch.is_grad_enabled)
            self.graph.call_function(set_grad_enabled, (False,))
        elif not off and self.mode_before is not None:
            self.graph.call_function(set_grad_enabled, (self.mode_before,))
            self.mode_before = None

    def _receive(self, start: int) -> None:
        tensors, sizes = self.crossings.crossing(start) if start else (self.trace.inputs, [])
        for node in tensors:
            self.new[node] = self.graph.placeholder(node.name)
        if sizes:
            carrier = self.graph.placeholder("sizes")
            for i, node in enumerate(sizes):
                self.new[node] = self.graph.call_method("size", (carrier, i))

    def _send(self, stop: int) -> None:
        tensors, sizes = self.crossings.crossing(stop)
        values = [self._read(node) for node in tensors]
        if sizes:  # reading a shape needs no copy from the device, unlike a value
            shape: Any = (*(self._read(node) for node in sizes), 0)
            values.append(self.graph.call_method("new_empty", (values[0], shape), {"dtype": torch.uint8}))
        self.graph.output(tuple(values))

    def _return(self) -> None:
        self.parts[OUTPUT] = self.trace.output_structure
        leaves: Any = fx.node.map_arg(self.trace.output.args[0], self._read)
        self.graph.output(self.graph.call_module(OUTPUT, tuple(leaves)))

    def _read(self, node: fx.Node) -> fx.Node:
        if node not in self.new:  # parameters, buffers and constants: a get_attr in each stage
            self.new[node] = self.graph.create_node("get_attr", self._held(str(node.target)), name=node.name)
        return self.new[node]

    def _held(self, target: str) -> str:
        """Add the attribute `target` of the model to the stage's module, and return its name there."""
        top, *rest = target.split(".")
        name = (
            f"{top}_" if hasattr(fx.GraphModule, top) else top
        )  # GraphModule has attributes such as `graph` and `code`
        self.parts.setdefault(name, self.trace.value(top))
        return ".".join([name, *rest])
