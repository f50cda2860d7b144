"""Traces a model's forward with torch.fx or torch.export into a graph of operations."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from nbdist import interrupts
from nbdist.core.params.preserve_model import device_of, preserve_model
from nbdist.core.strategies.pipeline.partition.call_signature import Call, FlatModel, OutputStructure
from nbdist.core.strategies.pipeline.partition.effects import Effect, refusal
from nbdist.core.strategies.pipeline.partition.fx_tracer import TracedDraw, drawn, trace_fx
from nbdist.errors import TaskError

__all__ = ["KINDS", "Trace", "cannot_split", "trace_forward"]

KINDS = ("fx", "export")
PREFIX = "model."  # prefix of all names in a graph of `FlatModel`
OURS, TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A traced forward, for one structure of arguments and one setting of train and eval modes.

    Its nodes call modules and functions, or read parameters, buffers and constants by the user's names.

    Args:
        kind: ``"fx"``, which may call children as a whole, or ``"export"``, which has single operations only.
        model: The user's model.
        call: The call that was traced.
        modes: ``training`` of each module.
        graph: Takes the call's tensors; returns the tuple of the output's tensors.
        constants: Tensors that are neither parameters nor buffers, by their name in the graph.
        output_structure: The structure of the output.
        guard: Raises AssertionError if the graph does not fit tensors of these shapes. None: it fits all.
    """

    kind: str
    model: nn.Module
    call: Call
    modes: tuple[bool, ...]
    graph: fx.Graph
    constants: dict[str, Any]
    output_structure: OutputStructure
    guard: Callable[..., Any] | None

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes of the call's tensors."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def body(self) -> list[fx.Node]:
        """The nodes that compute, in order; cuts are between them."""
        return [node for node in self.graph.nodes if node.op.startswith("call_")]

    @property
    def output(self) -> fx.Node:
        """The node that returns."""
        return self.graph.output_node()

    def value(self, target: str) -> Any:
        """The parameter, buffer, constant or module with the name `target` in the graph."""
        if target in self.constants:
            return self.constants[target]
        return operator.attrgetter(target)(self.model)

    def used_by(self, node: fx.Node) -> Iterator[torch.Tensor]:
        """The parameters, buffers and constants that a node of the body uses."""
        if node.op == "call_module":
            module = self.value(str(node.target))
            yield from module.parameters()
            yield from module.buffers()
        for source in node.all_input_nodes:
            value = self.value(str(source.target)) if source.op == "get_attr" else None
            if isinstance(value, torch.Tensor):
                yield value

    def fits(self, call: Call, modes: tuple[bool, ...]) -> bool:
        """Whether the graph is valid for another call."""
        if self.modes != modes or not self.call.same_but_for_tensors(call):
            return False
        if self.guard is None or self.call == call:
            return True
        if self.call.batch < 2 or call.batch < 2 or _dtypes(self.call) != _dtypes(call):
            return False  # traces specialize on a batch of one
        try:
            self.guard(*call.zeros("meta"))
        except AssertionError:
            return False
        return True


def trace_forward(model: nn.Module, call: Call, kind: str, effects: Sequence[Effect] = ()) -> Trace:
    """Trace the forward of a model in its present modes. Local; the model is left unchanged.

    Args:
        model: The user's model.
        call: With two samples or more, unless the graph is for one sample only.
        kind: ``"fx"``: fast; fails where forward depends on shapes or values, unless that is inside a child module,
            which is then called as a whole. ``"export"``: traces more models, but takes seconds.
        effects: The attributes that a forward changes beside its output.

    Raises:
        TaskError: The forward cannot be traced, and the message names the statement; or an attribute cannot be kept.
    """
    for effect in effects:
        if effect.counts and (kind == "export" or not effect.module):
            raise refusal(model, effect)
    flat = FlatModel(model, call, effects)
    with preserve_model(model):
        try:
            before = drawn(with_torch=False)
            with interrupts.delayed():  # a tracer patches torch.nn.Module, and leaves it so if its end is interrupted
                graph, root, guard = trace_fx(flat) if kind == "fx" else _trace_export(flat)
            if drawn(with_torch=False) != before:
                raise TracedDraw
        except TaskError:
            raise
        except Exception as error:
            raise cannot_split(model, statement(error), error) from error
    if flat.output_structures[0].empty:
        raise TaskError(
            f"{type(model).__name__} cannot be cut into stages: its output contains no tensor. Return tensors, "
            "or tuples, lists or dicts of them, or register the class with torch.export.register_dataclass."
        )
    constants = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            name = node.target.removeprefix(PREFIX)
            if name != node.target and _has_attribute(model, name):
                node.target = name
            else:  # a tensor or module made by the tracer
                value = operator.attrgetter(node.target)(root)
                node.target = node.target.replace(".", "_")
                constants[node.target] = value
    return Trace(
        kind=kind, model=model, call=call, modes=tuple(m.training for m in model.modules()), graph=graph,
        constants=constants, output_structure=flat.output_structures[0], guard=guard,
    )  # fmt: skip


def _trace_export(flat: FlatModel) -> tuple[fx.Graph, nn.Module, Callable[..., Any] | None]:
    """Trace with torch.export: the batch dimension is dynamic, the others are fixed."""
    import torch.export as export  # imports the compiler: a second

    batch = flat.call.batch
    free = tuple(
        {0: export.Dim.AUTO} if batch > 1 and leaf.shape[:1] == (batch,) else None for leaf in flat.call.tensors
    )
    values = tuple(flat.call.zeros(device_of(flat.model)))
    with _quiet():
        program = export.export(flat, (values,), dynamic_shapes=(free,), strict=False)
    root = program.module()
    graph = root.graph
    guard = None
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            guard = root.get_submodule("_guards_fn").forward
            graph.erase_node(node)
        elif node.target == torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it would fail under autocast, which changes dtypes
    return graph, root, guard


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings and graphs that torch.export prints."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def cannot_split(model: nn.Module, where: str, why: BaseException | str) -> TaskError:
    """The error for a model that cannot be traced; `where` is the `statement` that failed."""
    name = type(model).__name__
    untraceable = fx.proxy.TraceError.__name__, "GuardOnDataDependentSymNode"
    branches = type(why).__name__ in untraceable
    if branches and where:
        reason = f"its forward branches on tensor values, at {where}"
    else:
        text = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        reason = f"its forward cannot be traced{', at ' + where if where else ''}: {text.rstrip('.')}"
    return TaskError(
        f"{name} cannot be cut into stages: {reason}. Write a branch with torch.where, or move that statement into a "
        "module of its own, which then stays whole; or write the model as an nn.Sequential, or use another strategy."
    )


def statement(error: BaseException) -> str:
    """The user's statement at which tracing failed: its text, file and line."""
    elsewhere = (OURS, TORCH, "<string>", "<eval_with_key>", "<frozen")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(elsewhere)]
    if not frames:
        return ""
    return f"`{(frames[-1].line or '').strip()}` ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _has_attribute(model: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(model)
    except AttributeError:
        return False
    return True


def _dtypes(call: Call) -> list[torch.dtype]:
    return [leaf.dtype for leaf in call.tensors]
