"""The user's tensor-parallel plan: name patterns, and how the layers that they match are split."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nbdist.core.params.preserve_model import preserve_model
from nbdist.core.strategies.tensor.attention import is_splittable
from nbdist.core.strategies.tensor.auto_plan import derive_plan, sections, table_refusal
from nbdist.core.strategies.tensor.layer_graph import Trace
from nbdist.core.strategies.tensor.layers import KINDS, features
from nbdist.core.strategies.tensor.plan import Group, TensorPlan, cuts, owners
from nbdist.errors import PlanError, suggest

__all__ = ["plan_from_rules"]

_HEADS = "heads"


def plan_from_rules(
    model: nn.Module, size: int, rules: Mapping[str, str], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> TensorPlan:
    """Make a plan of the user's rules, to be verified by `verify_plan`. Local; `model` is left unchanged.

    Args:
        model: The whole module.
        size: The degree.
        rules: Pattern of names, as in ``blocks.*.up``, to a kind: "column", "row", "column_gather", "embedding",
            "attention" (an ``nn.MultiheadAttention``, or a module with layers for q, k, v and the output), or "heads"
            (an integer attribute, ``blocks.*.attn.n_head``, which is divided by the degree).
        args: Arguments of an example call, with at least two samples.
        kwargs: Its keyword arguments.

    Raises:
        PlanError: A pattern matches nothing that can be split this way, or a size is not divisible by the degree.
    """
    layers: dict[str, str] = {}
    divided: list[str] = []
    blocks: list[str] = []
    for pattern, kind in rules.items():
        if kind == _HEADS:
            divided += _attributes(model, size, pattern)
            continue
        if kind not in KINDS:
            raise PlanError(
                f"tensor plan: '{pattern}' is to be split as '{kind}', which is not a kind: use one of "
                f"{', '.join([*KINDS, _HEADS])}.{suggest(kind, [*KINDS, _HEADS])}"
            )
        for name in _matched(model, pattern, kind):
            if layers.setdefault(name, kind) != kind:
                raise PlanError(f"tensor plan: {name} is matched as '{layers[name]}' and as '{kind}'.")
            if kind == "attention" and not isinstance(model.get_submodule(name), nn.MultiheadAttention):
                blocks.append(name)
    for name in blocks:
        del layers[name]
    groups, others = _of_blocks(model, size, blocks, args, kwargs)
    _check_even(model, size, layers)
    if layers:
        groups = (_group_of_rules(model, size, layers, tuple(divided), args, kwargs), *groups)
    _check_tied(model, groups)
    return TensorPlan(size=size, groups=groups, others=others)


def _matched(model: nn.Module, pattern: str, kind: str) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    found = [name for name in modules if fnmatchcase(name, pattern)]
    if not found:
        raise PlanError(
            f"tensor plan: '{pattern}' matches no layer of {type(model).__name__}.{suggest(pattern, modules)}"
        )
    refusals = {name: _refusal(modules[name], kind) for name in found}
    able = [name for name, refusal in refusals.items() if not refusal]
    if not able:
        name, refusal = next(iter(refusals.items()))
        raise PlanError(f"tensor plan: '{pattern}' cannot be split as '{kind}': {name} {refusal}.")
    return able


def _refusal(module: nn.Module, kind: str) -> str:
    if kind == "embedding":
        return table_refusal(module)
    if kind == "attention":
        if isinstance(module, nn.MultiheadAttention) and not is_splittable(module):
            return "is an attention with extra keys, or with another forward"
        return "" if next(module.children(), None) is not None else f"is a {type(module).__name__}, not an attention"
    return "" if features(module) else f"is a {type(module).__name__}, not a linear layer"


def _attributes(model: nn.Module, size: int, pattern: str) -> list[str]:
    integers = {
        f"{name}.{attribute}" if name else attribute: value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is int
    }
    found = {path: value for path, value in integers.items() if fnmatchcase(path, pattern)}
    if not found:
        raise PlanError(f"tensor plan: '{pattern}' matches no integer attribute.{suggest(pattern, integers)}")
    for path, value in found.items():
        if value % size:
            raise PlanError(f"tensor plan: {path} is {value}, which {size} ranks cannot share evenly.")
    return list(found)


def _of_blocks(
    model: nn.Module, size: int, blocks: list[str], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The attention that `derive_plan` finds in each of these modules, and the other ways to split it."""
    if not blocks:
        return (), ()
    plan = derive_plan(model, size, args, kwargs)
    groups = {group.block: group for group in plan.groups if group.kind == "attention"}
    for name in blocks:
        if name not in groups:
            reason = next((why for layer, why in plan.reasons.items() if layer.startswith(f"{name}.")), "")
            raise PlanError(f"tensor plan: no attention whose heads can be split is found in {name} {reason}".rstrip())
    wanted = tuple(groups[name] for name in blocks)
    return wanted, tuple(other for other in plan.others if other.kind == "attention" and other.block in blocks)


def _group_of_rules(
    model: nn.Module, size: int, layers: dict[str, str], divided: tuple[str, ...], args: tuple[Any, ...], kwargs: Any
) -> Group:
    """One group of all the user's layers, with the dropouts and parameters between its columns and rows."""
    with preserve_model(model):
        model.train()
        trace = Trace(model, args, kwargs or {})
    columns = {name for name, kind in layers.items() if kind == "column"}
    dropouts: dict[str, int] = {}
    draws: dict[int, int] = {}
    partial: set[str] = set()
    parts: dict[str, tuple[int, ...]] = {}
    for row in (name for name, kind in layers.items() if kind == "row" and name in trace.called):
        region = trace.region(row)
        if region is None:
            continue
        for name in region.columns:
            if name not in columns:
                raise PlanError(f"tensor plan: {row} is a row, but its inputs come from {name}, which is no column.")
            widths = (features(model.get_submodule(layer)) or (0, 0) for layer in (row, name))
            (width, _), (_, outputs) = widths
            parts[name] = next(sections(outputs, width, size))
        dropouts |= region.dropouts
        draws |= region.draws  # the group's block is the model itself
        partial |= region.partial
    return Group(
        kind="own", block="", key="own", layers=layers, sections=parts, divided=divided, dropouts=dropouts,
        draws=draws, partial=tuple(sorted(partial)),
    )  # fmt: skip


def _check_even(model: nn.Module, size: int, layers: dict[str, str]) -> None:
    for name, kind in layers.items():
        layer: Any = model.get_submodule(name)
        if kind == "attention":
            what, count = "heads", layer.num_heads
        elif kind == "embedding":
            what, count = "rows", layer.num_embeddings
        else:
            inputs, outputs = features(layer) or (0, 0)
            what, count = ("inputs", inputs) if kind == "row" else ("outputs", outputs)
        if count % size:
            raise PlanError(
                f"{name} has {count} {what}, which {size} ranks cannot share evenly: leave it out of the tensor plan, "
                f"or choose a tp degree that divides {count}."
            )


def _check_tied(model: nn.Module, groups: tuple[Group, ...]) -> None:
    split = {name for group in groups for name in group.layers}
    split_parameters = cuts(model, groups)
    for parameter, paths in owners(model).items():
        whole = sorted(set(paths) - split)
        if parameter in split_parameters and len(set(paths)) > 1 and whole:
            raise PlanError(
                f"tensor plan: {parameter} belongs to {' and '.join(sorted(set(paths)))}, but {whole[0]} is not split: "
                "name it too."
            )
