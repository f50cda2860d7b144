"""Traces with torch.fx, in which buffers are values of the graph, and what is written to them is an operation."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from nbdist.core.params.extra_state import stateful_modules
from nbdist.core.strategies.pipeline.partition.call_signature import FlatModel, OutputStructure
from nbdist.core.strategies.pipeline.partition.effects import ReadAttributes, refusal, set_data_, store_, to_tensor
from nbdist.errors import TaskError

__all__ = ["NO_GRAD", "TracedDraw", "drawn", "trace_fx"]

NO_GRAD = "nbdist_no_grad"
"""Key in ``meta`` of nodes that were traced while gradients were off."""


class TracedDraw(Exception):
    """A traced forward drew random numbers that are no values of the graph."""

    def __str__(self) -> str:
        return "it draws random numbers with Python, or chooses a branch by one"


class _Writable(fx.Proxy):
    """Like torch's, but writing in place is an operation, and not an error or a new value."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.tracer.create_proxy("call_function", set_data_, (self, value), {})
        else:
            super().__setattr__(name, value)


class _Attribute(_Writable, fx.proxy.Attribute):
    """An attribute of a value, such as ``data``."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(_Writable, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    """Traces down to the modules of torch.nn, and to those found to be untraceable."""

    proxy_buffer_attributes = True

    def __init__(self, flat: FlatModel, whole: set[int]) -> None:
        super().__init__()
        self.flat = flat
        self.model = flat.model
        self.whole = whole
        self.culprit: nn.Module | None = None  # the innermost module in which tracing failed
        self.readers: list[ReadAttributes] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See `fx.Tracer`."""
        return _Writable(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """See `fx.Tracer`."""
        node = super().create_node(*args, **kwargs)
        if not torch.is_grad_enabled():
            node.meta[NO_GRAD] = True
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `fx.Tracer`."""
        if isinstance(m, ReadAttributes):
            return True
        leaf = id(m) in self.whole or super().is_leaf_module(m, module_qualified_name)
        return leaf and m is not self.model

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """See `fx.Tracer`."""
        leaf = not isinstance(m, ReadAttributes) and self.is_leaf_module(m, self.path_of_module(m))
        before = None if leaf else drawn()
        try:
            output = super().call_module(m, forward, args, kwargs)
            if before is not None and drawn() != before:
                raise TracedDraw
        except Exception:
            self.culprit = self.culprit or m
            raise
        if leaf and self.flat.effects:
            self._read_attributes(m, output)
        return output

    def _read_attributes(self, leaf: nn.Module, output: fx.Proxy) -> None:
        """What runs later reads the attributes that the call leaves, and not those of the time of tracing."""
        inside = {id(module) for module in leaf.modules()}
        modules = dict(self.model.named_modules())
        effects = [e for e in self.flat.effects if id(modules[e.module]) in inside]
        if not effects:
            return
        for effect in effects:
            if not effect.sendable:
                raise refusal(self.model, effect)
        places = [(modules[effect.module], effect.name) for effect in effects]
        reader = ReadAttributes(places, [modules[effect.module] for effect in effects if effect.counts])
        self.flat.add_module(f"nbdist_attributes_{len(self.readers)}", reader)
        self.readers.append(reader)
        for (module, name), value in zip(places, [reader(output)[i] for i in range(len(places))], strict=True):
            module.__dict__[name] = value

    def path_of_module(self, mod: nn.Module) -> str:
        """See `fx.Tracer`."""
        for i, reader in enumerate(self.readers):
            if mod is reader:
                return f"nbdist_attributes_{i}"
        return super().path_of_module(mod)


def drawn(with_torch: bool = True) -> Any:
    """The states of the generators on the CPU: a number drawn while tracing becomes a constant, or chooses a branch."""
    numpy = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    theirs = [part.tobytes() if hasattr(part, "tobytes") else part for part in state]
    return random.getstate(), theirs, torch.get_rng_state().numpy().tobytes() if with_torch else b""


def trace_fx(flat: FlatModel) -> tuple[fx.Graph, nn.Module, None]:
    """Trace with torch.fx; each failure makes the modules of one class leaves, until it works or none is left.

    So are modules whose attributes count calls, and those with extra state: only they themselves can keep it.
    """
    modules = dict(flat.model.named_modules())
    whole = {id(modules[effect.module]) for effect in flat.effects if effect.counts}
    whole |= {id(module) for module in stateful_modules(flat.model).values()} - {id(flat.model)}
    while True:
        tracer = _Tracer(flat, whole)
        flat.output_structures[0] = OutputStructure()
        try:
            graph = tracer.trace(flat)
            break
        except TaskError:
            raise
        except Exception:
            culprit = tracer.culprit
            alike = {id(m) for m in flat.model.modules() if type(m) is type(culprit)} - {id(flat.model)}
            if alike <= whole:
                raise
            whole |= alike
        finally:
            flat.restore()
    _name_inputs(graph, len(flat.call.tensors))
    _store_buffers(graph)
    _send_numbers(graph, flat.output_structures[0])
    return graph, flat, None


def _send_numbers(graph: fx.Graph, structure: OutputStructure) -> None:
    """Make tensors of the attributes among the outputs, each right after it is computed: a cut lets only those pass."""
    output = graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    for i in range(len(values) - structure.sent, len(values)):
        with graph.inserting_after(values[i]):
            values[i] = graph.call_function(to_tensor, (values[i],))
    output.args = (values,)


def _store_buffers(graph: fx.Graph) -> None:
    """Copy into a buffer what forward assigned to it, after the last write to that value.

    What else reads the buffer gets a copy of it: the copying must not change what autograd has saved.
    """
    for marked in [node for node in graph.nodes if node.target is store_]:
        name, value = marked.args
        assert isinstance(value, fx.Node)
        for read in graph.find_nodes(op="get_attr", target=name):
            with graph.inserting_after(read):
                copy = graph.call_method("clone", (read,))
            read.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        with graph.inserting_after(_last_write(value)):
            buffer = graph.get_attr(name)
        with graph.inserting_after(buffer):
            graph.call_function(store_, (buffer, value))
        graph.erase_node(marked)


def _last_write(value: fx.Node) -> fx.Node:
    """The last node that seems to write to a value or to a view of it: by its name, verification finds the rest."""
    last, views = value, [value]
    while views:
        for user in views.pop().users:
            name = str(getattr(user.target, "__name__", user.target))
            if user.target is store_:
                continue
            if name.endswith("_") or name in ("setitem", "getattr") or name.startswith("i"):
                views.append(user)
                last = max(last, user)
    return last


def _name_inputs(graph: fx.Graph, count: int) -> None:
    """Replace the graph's one input, a list, by an input for each element."""
    values = graph.find_nodes(op="placeholder")[0]
    elements = {node.args[1]: node for node in values.users}
    for i in range(count):
        with graph.inserting_before(values):
            new = graph.placeholder(f"leaves_{i}")
        if i in elements:
            elements[i].replace_all_uses_with(new)
            graph.erase_node(elements[i])
    graph.erase_node(values)
