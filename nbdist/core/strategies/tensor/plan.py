"""The tensor-parallel plan: which layers are split, how, and why others are not. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nbdist.core.params.placement import Cut
from nbdist.core.strategies.tensor.layers import cuts_of

__all__ = ["Group", "TensorPlan", "cuts", "owners"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are split together or not at all.

    Args:
        kind: For display: "attention", "mlp", "embedding", "linear", or "own" from the user's rules.
        block: The innermost module that holds its layers.
        key: Equal for groups of the same structure, as in the blocks of a transformer: they are verified together.
        layers: Name of each layer to its kind, see `KINDS`.
        sections: Sections of the outputs of a fused layer, such as q, k and v.
        divided: Integer attributes, such as head counts, that are divided by the degree.
        dropouts: Dropout modules between the layers, and the dim along which their input is split.
        draws: The same for dropout functions, by their number in the forward of `block`.
        partial: Whole parameters between the layers, whose gradients are summed over ranks.
    """

    kind: str
    block: str
    key: str
    layers: dict[str, str]
    sections: dict[str, tuple[int, ...]] = field(default_factory=dict)
    divided: tuple[str, ...] = ()
    dropouts: dict[str, int] = field(default_factory=dict)
    draws: dict[int, int] = field(default_factory=dict)
    partial: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How a module is split.

    Args:
        size: The degree.
        groups: The groups to split.
        others: Other ways to split a group, in order, for `verify_plan` to try if the first one changes results.
        reasons: Why layers stay whole, or are split by themselves only.
    """

    size: int
    groups: tuple[Group, ...]
    others: tuple[Group, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, str]:
        """Every layer that is split, and its kind."""
        return {name: kind for group in self.groups for name, kind in group.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """The plan in lists, dicts, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorPlan:
        """The inverse of `to_dict`, also after JSON."""
        return cls(**{**data, "groups": _groups(data["groups"]), "others": _groups(data["others"])})


def _groups(data: Iterable[dict[str, Any]]) -> tuple[Group, ...]:
    return tuple(
        Group(
            **{
                **group,
                "sections": {name: tuple(lengths) for name, lengths in group["sections"].items()},
                "draws": {int(number): dim for number, dim in group["draws"].items()},
                "divided": tuple(group["divided"]),
                "partial": tuple(group["partial"]),
            }
        )
        for group in data
    )


def cuts(model: nn.Module, groups: Iterable[Group]) -> dict[str, Cut]:
    """How each split parameter of a whole `model` is cut, by its first name. Local."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for name, kind in group.layers.items():
            layer = model.get_submodule(name)
            for local, cut in cuts_of(layer, kind, group.sections.get(name)).items():
                found[names[id(_parameter(layer, local))]] = cut
    return found


def owners(model: nn.Module) -> dict[str, list[str]]:
    """The modules that hold each parameter, by its first name; several if it is tied. Local."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for path, _, parameter in _held(model):
        found.setdefault(names[id(parameter)], []).append(path)
    return found


def _held(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    for path, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield path, local, parameter


def _parameter(layer: nn.Module, path: str) -> nn.Parameter:
    inner, _, local = path.rpartition(".")
    parameter: nn.Parameter = getattr(layer.get_submodule(inner), local)
    return parameter
