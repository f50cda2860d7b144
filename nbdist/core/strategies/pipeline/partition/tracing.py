"""A model's forward as a graph of operations, recorded by torch.fx or torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from nbdist.core.params.preserve import device_of, untouched
from nbdist.core.strategies.pipeline.partition.call import Call, Flat, Form
from nbdist.errors import TaskError

__all__ = ["KINDS", "Trace", "cannot_split", "record"]

KINDS = ("fx", "export")
PREFIX = "model."  # what names in a graph of `Flat` begin with
OURS, TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A recorded forward: for one structure of arguments and one setting of train and eval.

    Its nodes call modules and functions, or read parameters, buffers and constants by the user's names.

    Args:
        kind: ``"fx"``, in which children may stay whole, or ``"export"``, in which everything is in single operations.
        model: The user's model.
        call: The call that was recorded.
        modes: ``training`` of each module.
        graph: Takes the call's tensors; returns the tuple of the output's tensors.
        constants: Tensors that are neither parameters nor buffers, by the name the graph reads them by.
        form: The structure of the output.
        guard: Raises AssertionError where the graph does not fit tensors of other shapes. None: it fits all.
    """

    kind: str
    model: nn.Module
    call: Call
    modes: tuple[bool, ...]
    graph: fx.Graph
    constants: dict[str, Any]
    form: Form
    guard: Callable[..., Any] | None

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes of the call's tensors."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def body(self) -> list[fx.Node]:
        """The nodes that compute, in order; between them is cut."""
        return [node for node in self.graph.nodes if node.op.startswith("call_")]

    @property
    def output(self) -> fx.Node:
        """The node that returns."""
        return self.graph.output_node()

    def value(self, target: str) -> Any:
        """The parameter, buffer, constant or module of the user's that the graph calls `target`."""
        if target in self.constants:
            return self.constants[target]
        return operator.attrgetter(target)(self.model)

    def held(self, node: fx.Node) -> Iterator[torch.Tensor]:
        """The parameters, buffers and constants that a node of the body works with."""
        if node.op == "call_module":
            module = self.value(str(node.target))
            yield from module.parameters()
            yield from module.buffers()
        for source in node.all_input_nodes:
            value = self.value(str(source.target)) if source.op == "get_attr" else None
            if isinstance(value, torch.Tensor):
                yield value

    def fits(self, call: Call, modes: tuple[bool, ...]) -> bool:
        """Whether the graph computes what the model would for another call."""
        if self.modes != modes or not self.call.same_but_for_tensors(call):
            return False
        if self.guard is None or self.call == call:
            return True
        if self.call.batch < 2 or call.batch < 2 or _dtypes(self.call) != _dtypes(call):
            return False  # what is recorded of a batch of one, or for one, may hold for it only
        try:
            self.guard(*call.zeros("meta"))
        except AssertionError:
            return False
        return True


def record(model: nn.Module, call: Call, kind: str) -> Trace:
    """Record the forward of a model in its present modes. Local; the model is left as it was.

    Args:
        model: The user's.
        call: Its tensors have two samples or more, if the graph is to serve any number.
        kind: ``"fx"``: fast; fails where forward depends on shapes or values, unless it is inside a child module,
            which then stays whole. ``"export"``: takes much more, and seconds.

    Raises:
        TaskError: It cannot be recorded. The message names the statement.
    """
    flat = Flat(model, call)
    with untouched(model):
        try:
            graph, root, guard = _record_fx(flat) if kind == "fx" else _record_export(flat)
        except Exception as error:
            raise cannot_split(model, statement(error), error) from error
    if flat.forms[0].empty:
        raise TaskError(
            f"{type(model).__name__} cannot be cut into stages: no tensor is found in what it returns. Return tensors, "
            "or tuples, lists or dicts of them, or register the class with torch.export.register_dataclass."
        )
    constants = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            name = node.target.removeprefix(PREFIX)
            if name != node.target and _there(model, name):
                node.target = name
            else:  # made while recording
                value = operator.attrgetter(node.target)(root)
                node.target = node.target.replace(".", "_")
                constants[node.target] = value
    return Trace(
        kind=kind, model=model, call=call, modes=tuple(m.training for m in model.modules()), graph=graph,
        constants=constants, form=flat.forms[0], guard=guard,
    )  # fmt: skip


class _Tracer(fx.Tracer):
    """Records down to the modules of torch.nn, and to those found to be untraceable."""

    def __init__(self, model: nn.Module, whole: set[int]) -> None:
        super().__init__()
        self.model = model
        self.whole = whole
        self.culprit: nn.Module | None = None  # the innermost module in which tracing failed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `fx.Tracer`."""
        leaf = id(m) in self.whole or super().is_leaf_module(m, module_qualified_name)
        return leaf and m is not self.model

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """See `fx.Tracer`."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or m
            raise


def _record_fx(flat: Flat) -> tuple[fx.Graph, nn.Module, None]:
    """Record with torch.fx; each failure makes the modules of one class leaves, until it works or none is left."""
    whole: set[int] = set()
    while True:
        tracer = _Tracer(flat.model, whole)
        flat.forms[0] = Form()
        try:
            graph = tracer.trace(flat)
            break
        except Exception:
            culprit = tracer.culprit
            alike = {id(m) for m in flat.model.modules() if type(m) is type(culprit)} - {id(flat.model)}
            if alike <= whole:
                raise
            whole |= alike
    _name_inputs(graph, len(flat.call.tensors))
    return graph, flat, None


def _name_inputs(graph: fx.Graph, count: int) -> None:
    """Replace the one input, a list, by its elements."""
    values = graph.find_nodes(op="placeholder")[0]
    elements = {node.args[1]: node for node in values.users}
    for i in range(count):
        with graph.inserting_before(values):
            new = graph.placeholder(f"leaves_{i}")
        if i in elements:
            elements[i].replace_all_uses_with(new)
            graph.erase_node(elements[i])
    graph.erase_node(values)


def _record_export(flat: Flat) -> tuple[fx.Graph, nn.Module, Callable[..., Any] | None]:
    """Record with torch.export: the first dimension is free where it is that of the batch, the others are fixed."""
    import torch.export as export  # loads the compiler at first use: a second

    batch = flat.call.batch
    free = tuple(
        {0: export.Dim.AUTO} if batch > 1 and leaf.shape[:1] == (batch,) else None for leaf in flat.call.tensors
    )
    values = tuple(flat.call.zeros(device_of(flat.model)))
    with _silence():
        program = export.export(flat, (values,), dynamic_shapes=(free,), strict=False)
    root = program.module()
    graph = root.graph
    guard = None
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            guard = root.get_submodule("_guards_fn").forward
            graph.erase_node(node)
        elif node.target == torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # would fail under autocast
    return graph, root, guard


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep export's remarks and graphs, meant for those who call it themselves, away from the user."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def cannot_split(model: nn.Module, where: str, why: BaseException | str) -> TaskError:
    """The error for a model of which no graph can be made; `where` is the `statement` that stood in the way."""
    name = type(model).__name__
    branches = isinstance(why, fx.proxy.TraceError) or type(why).__name__ == "GuardOnDataDependentSymNode"
    if branches and where:
        reason = f"which way its forward goes depends on the values it works with, at {where}"
    else:
        text = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        reason = f"its forward cannot be recorded{', at ' + where if where else ''}: {text.rstrip('.')}"
    return TaskError(
        f"{name} cannot be cut into stages: {reason}. Write a branch with torch.where, or move that statement into a "
        "module of its own, which then stays whole; or write the model as an nn.Sequential, or use another strategy."
    )


def statement(error: BaseException) -> str:
    """The user's statement in which recording failed: its text and place."""
    elsewhere = (OURS, TORCH, "<string>", "<eval_with_key>", "<frozen")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(elsewhere)]
    if not frames:
        return ""
    return f"`{(frames[-1].line or '').strip()}` ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _there(model: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(model)
    except AttributeError:
        return False
    return True


def _dtypes(call: Call) -> list[torch.dtype]:
    return [leaf.dtype for leaf in call.tensors]
