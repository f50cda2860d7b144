"""What a step must leave to the training loop: backward, and the steps of optimizers and schedulers."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbdist.errors import TaskError

__all__ = [
    "attributes_read",
    "calls_parts_only",
    "check_step",
    "explained_step",
    "function_of",
    "names_read",
    "outside_modules",
    "outside_values",
    "uses",
]

_CURE = "leave it out: nbdist runs backward, sums gradients over ranks, and steps optimizer and lr_scheduler"
_LOADS = ("LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_AGAIN = "backward through the graph a second time"
_WRITTEN = "modified by an inplace operation"
_MIXED = re.compile(r"same dtype|type .* should be the same|expected scalar type|mixed dtype")
_WHOLE = re.compile(r"long|int\b|byte|cuda", re.IGNORECASE)
_NO_TENSOR = re.compile(r"must be Tensor, not (list|tuple)$")
_UNBOUND = "cannot access local variable", "referenced before assignment"


def check_step(step: Any, model: nn.Module, data: Any = None) -> None:
    """Check that a step can be called, and leaves optimizers and schedulers to nbdist. Local; it is not called.

    Args:
        step: The step.
        model: Its first argument.
        data: The training data, whose batches it gets.

    Raises:
        TaskError: It takes other arguments, steps an optimizer of the model itself, or reads the data itself.
    """
    try:
        inspect.signature(step).bind(model, None)
    except TypeError as error:
        raise TaskError(
            f"step takes other arguments than (model, batch), with which it is called ({error}): take the batch apart "
            "in the step, as in `x, y = batch`."
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    function = function_of(step)
    if function is None:
        return
    own = {id(parameter) for parameter in model.parameters()}
    for name, value, attribute in _uses(function):
        optimizer = getattr(value, "optimizer", value)
        if attribute != "step" or not isinstance(optimizer, torch.optim.Optimizer):
            continue
        if own.intersection(id(p) for group in optimizer.param_groups for p in group["params"]):
            option = "optimizer" if optimizer is value else "lr_scheduler"
            how = f"{option}=... (--{option.replace('_', '-')})"
            raise TaskError(f"the step calls {name}.step(): {_CURE}; give the {option} as {how}.")
    if (read := _reads_itself(function, data)) is not None:
        raise TaskError(
            f"the step reads {read} itself, and not its batch, so every rank would go through all of it in each step: "
            "leave the loop out, and take the batch apart, as in `x, y = batch`."
        )
    names = _names(function.__code__)
    if "zero_grad" in names and "backward" not in names:
        raise TaskError(f"the step calls zero_grad(), which clears what earlier slices of the batch gave: {_CURE}.")


def _reads_itself(function: types.FunctionType, data: Any) -> str | None:
    """The name by which a step reads the training data, if it does not read its second argument."""
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount]
    if data is None or isinstance(data, (int, float, str)) or len(arguments) < 2:
        return None
    batch = arguments[1 + (arguments[0] == "self") :][:1]
    instructions = (one for part in _codes(code) for one in dis.get_instructions(part))
    for one in instructions:
        found = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        if one.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and set(batch) & set(found):
            return None
    return next((name for name, value in outside_values(function) if value is data), None)


def explained_step(error: BaseException, step: Any) -> TaskError | None:
    """The sentence for an error of a step that only Python or torch has described; None for others. Local."""
    text = str(error)
    function = function_of(step)
    names = set[str]() if function is None else _names(function.__code__)
    if isinstance(error, RuntimeError) and _AGAIN in text and "backward" in names:
        return TaskError(f"the step calls backward() on the loss that it returns: {_CURE}.")
    if isinstance(error, RuntimeError) and _WRITTEN in text and "update" in names:
        return TaskError(
            "a loss goes through parameters as they were before nbdist.update changed them: compute what it needs of "
            "them again after that update, as a loop of one process has to."
        )
    if isinstance(error, RuntimeError) and _MIXED.search(text) and not _WHOLE.search(text):
        return TaskError(
            f"tensors of two dtypes meet in the step (torch: {text.splitlines()[0].rstrip('.')}): give the data in the "
            "model's, as in x.float(), or array.astype('float32'), since NumPy's numbers are float64."
        )
    if isinstance(error, TypeError) and _NO_TENSOR.search(text):
        return TaskError(
            f"a list is where the step needs a tensor (torch: {text.splitlines()[0].rstrip('.')}): let the data give "
            "tensors or NumPy arrays; lists of numbers are collated number by number (of Hugging Face's datasets, "
            "give data.with_format('torch'))."
        )
    if isinstance(error, UnboundLocalError) and any(words in text for words in _UNBOUND):
        name = text.split("'")[1] if "'" in text else "a name"
        return TaskError(unbound(name))
    return None


def unbound(name: str) -> str:
    """That a step reads a name before it assigns it."""
    return (
        f"the step assigns {name}, so {name} is a local name of it, and it is read before: call what is assigned by "
        f"another name (new_{name} = ...); for what stays from step to step there is nbdist.carried."
    )


def outside_modules(step: Any, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a step uses beside the model, by the names that it has for them. Local."""
    function = function_of(step)
    inside = {id(module) for module in model.modules()}
    found = {} if function is None else dict(outside_values(function))
    return {name: value for name, value in found.items() if isinstance(value, nn.Module) and id(value) not in inside}


def uses(step: Any, function: Any) -> bool:
    """Whether a step names a function in its code, or in that of Python functions which this names. Local."""
    waiting, seen, wanted = [function_of(step)], set[int](), function.__name__
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        # No other attribute is read: some import modules, or run the user's code.
        if any(attribute == wanted and getattr(value, wanted, None) is function for _, value, attribute in _uses(one)):
            return True
        instructions = [i for code in _codes(one.__code__) for i in dis.get_instructions(code)]
        imported = [sys.modules.get(i.argval) for i in instructions if i.opname == "IMPORT_NAME"]
        if wanted in _names(one.__code__) and any(getattr(module, wanted, None) is function for module in imported):
            return True
        values = [value for _, value in outside_values(one)]
        if any(value is function for value in values):
            return True
        waiting += [value for value in values if isinstance(value, types.FunctionType) and not _is_of_torch(value)]
    return False


def _is_of_torch(function: types.FunctionType) -> bool:
    """Whether torch defines a function: those name hundreds of others, and nothing of nbdist."""
    return str(function.__module__).partition(".")[0] == "torch"


def names_read(step: Any) -> frozenset[str]:
    """The names from outside that a function reads, and Python functions of the user that it names. Local."""
    waiting, seen, names = [function_of(step)], set[int](), set[str]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen or _is_of_torch(one):
            continue
        seen.add(id(one))
        found = dict(outside_values(one))
        names |= found.keys()
        waiting += [value for value in found.values() if isinstance(value, types.FunctionType)]
    return frozenset(names)


def attributes_read(given: Any, method: str) -> frozenset[str]:
    """The attributes that a method of an object names in its code, and those methods that it names. Local."""
    waiting, seen = [method], set[str]()
    while waiting:
        name = waiting.pop()
        function = getattr(getattr(type(given), name, None), "__code__", None)
        if name in seen or function is None:
            continue
        seen.add(name)
        waiting += _names(function)
        seen |= {one for one in _names(function) if not hasattr(getattr(type(given), one, None), "__code__")}
    return frozenset(seen)


def calls_parts_only(step: Any, model: Any) -> bool:
    """Whether a step calls parts of the model and methods of its own, and never the model itself. Local.

    Args:
        step: ``step(model, batch)``, or a method of the model.
        model: The model.
    """
    function = function_of(step)
    bound = isinstance(step, types.MethodType)
    place = int(bound and getattr(step, "__self__", None) is not model)
    waiting, seen, any_read = [(function, place)], set[Any](), False
    while waiting:
        one, place = waiting.pop()
        if one is None or len(one.__code__.co_varnames) <= place:
            return False
        if one in seen:
            continue
        seen.add(one)
        for attribute in _attributes_of(one, one.__code__.co_varnames[place]):
            if attribute in ("", "forward", "__call__"):  # it is called, or handed on
                return False
            any_read = True
            method = getattr(type(model), attribute, None)
            if isinstance(method, types.FunctionType) and not isinstance(
                getattr(nn.Module, attribute, None), types.FunctionType
            ):
                waiting.append((method, 0))
    return any_read


def _attributes_of(function: types.FunctionType, name: str) -> Iterator[str]:
    """Each attribute that a function takes of one of its arguments; empty where it does something else with it."""
    for code in _codes(function.__code__):
        instructions = [*dis.get_instructions(code)]
        for one, after, third in zip(instructions, instructions[1:], [*instructions[2:], None], strict=False):
            if not one.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
                continue
            loaded = one.argval if isinstance(one.argval, tuple) else (one.argval,)
            if name not in loaded or one.opname == "LOAD_CLOSURE":
                continue
            if loaded[-1] == name and after.opname in _ATTRIBUTES:
                yield after.argval
            else:  # or an item, as of a ModuleDict
                item = third is not None and third.opname.startswith("BINARY_SUBSCR")
                yield f"[{after.argval!r}]" if item and after.opname == "LOAD_CONST" and loaded[-1] == name else ""


def function_of(step: Any) -> types.FunctionType | None:
    """The Python function behind a callable; None for others. Local."""
    while isinstance(step, functools.partial):
        step = step.func
    if not isinstance(step, (type, torch.nn.Module, types.FunctionType, types.MethodType)):
        step = type(step).__call__  # of an object that is callable
    step = getattr(step, "__func__", step)
    return step if isinstance(step, types.FunctionType) else None


def outside_values(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function, and functions inside it, find under global names, and those of functions around it. Local."""
    names = {
        one.argval for code in _codes(function.__code__) for one in dis.get_instructions(code) if one.opname in _LOADS
    }
    yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _uses(function: types.FunctionType) -> Iterator[tuple[str, Any, str]]:
    """Each attribute that a function takes of a value from outside: name, value, attribute."""
    values = dict(outside_values(function))
    for code in _codes(function.__code__):
        before: dis.Instruction | None = None
        for instruction in dis.get_instructions(code):
            loaded = before is not None and before.opname in _LOADS and before.argval in values
            if loaded and before is not None and instruction.opname in _ATTRIBUTES:
                yield before.argval, values[before.argval], instruction.argval
            before = instruction


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    return {name for one in _codes(code) for name in one.co_names}
