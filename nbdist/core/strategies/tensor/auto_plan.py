"""The automatic tensor-parallel plan: derived from the dependencies of layers, not from their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from nbdist.core.params.preserve_model import preserve_model
from nbdist.core.strategies.tensor.attention import is_splittable
from nbdist.core.strategies.tensor.layer_graph import Region, Trace
from nbdist.core.strategies.tensor.layers import features
from nbdist.core.strategies.tensor.plan import Group, TensorPlan, owners
from nbdist.errors import PlanError

__all__ = ["derive_plan", "nothing_to_split", "sections", "table_refusal"]

_HEADS = {
    "h", "heads", "n_head", "n_heads", "n_kv_head", "n_kv_heads", "nhead", "nheads", "num_attention_heads",
    "num_head", "num_heads", "num_key_value_heads", "num_kv_heads",
}  # fmt: skip
"""Usual names of attributes that count heads."""
_MIN_SHARE = 0.01
"""Smallest share of the model's parameters for which a layer is split by itself, at one collective per use."""


def derive_plan(model: nn.Module, size: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> TensorPlan:
    """Propose how to split a module, to be verified by `verify_plan`. Local; the module is left unchanged.

    Args:
        model: The whole module.
        size: The degree.
        args: Arguments of an example call, with at least two samples.
        kwargs: Its keyword arguments.

    Raises:
        PlanError: Nothing can be split.
    """
    with preserve_model(model):
        model.train()
        trace = Trace(model, args, kwargs or {})
    search = _Search(model, size, trace)
    search.find_attentions()
    search.find_column_row()
    search.find_single()
    if not search.groups:
        raise nothing_to_split(model, size, search.reasons_whole())
    return TensorPlan(
        size=size, groups=tuple(search.groups), others=tuple(search.others), reasons=search.reasons_whole()
    )


def nothing_to_split(model: nn.Module, size: int, reasons: dict[str, str]) -> PlanError:
    """The error that lists the layers, and why each stays whole."""
    shown = [f"{name or 'the model itself'} {reason}" for name, reason in list(reasons.items())[:4]]
    more = f", and {len(reasons) - 4} more layers" if len(reasons) > 4 else ""
    why = "; ".join(shown) + more if shown else "it has no linear layers, embeddings or attention"
    return PlanError(
        f"nothing of {type(model).__name__} can be split over {size} ranks: {why}. "
        "Choose another tp degree or --strategy, or name the layers to split in a tensor plan."
    )


def table_refusal(layer: nn.Module) -> str:
    """Why the rows of an embedding cannot be split, or an empty string."""
    if type(layer).forward is not nn.Embedding.forward or "forward" in vars(layer):
        return f"is a {type(layer).__name__}, not a plain embedding"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(layer, option):
            return f"has {option}, which needs all rows at once"
    return ""


class _Search:
    def __init__(self, model: nn.Module, size: int, trace: Trace) -> None:
        self.size = size
        self.groups: list[Group] = []
        self.others: list[Group] = []
        self.reasons: dict[str, str] = {}
        self._model = model
        self._trace = trace
        self._modules = dict(model.named_modules())
        self._owners = owners(model)
        self._tied = {path for paths in self._owners.values() if len(set(paths)) > 1 for path in paths}
        self._taken: set[str] = set()
        self._total = sum(p.numel() for p in model.parameters())

    def find_attentions(self) -> None:
        """Split the heads of each nn.MultiheadAttention."""
        for name in self._trace.called:
            layer: Any = self._modules[name]
            if not isinstance(layer, nn.MultiheadAttention):
                continue
            if not is_splittable(layer) or name in self._tied:
                self.reasons[name] = "is an attention with extra keys, or with another forward"
            elif layer.num_heads % self.size:
                self.reasons[name] = f"has {layer.num_heads} heads{self._uneven}"
            else:
                key = f"attention:{layer.num_heads} heads of {layer.embed_dim}"
                self._add([Group(kind="attention", block=name, key=key, layers={name: "attention"})])

    def find_column_row(self) -> None:
        """Linear layers that feed another one, as columns and row: q, k, v and o; up and down; gate, up and down."""
        for row in self._trace.linears():
            region = None if row in self._taken else self._trace.region(row)
            if region is None or {row, *region.columns} & (self._taken | self._tied) or row in region.columns:
                continue
            reason = self._uneven_in(row, region)
            if reason:
                self.reasons.setdefault(row, reason)
                for name in region.columns:
                    self.reasons.setdefault(name, f"feeds {row}, which {reason}")
            else:
                self._add(list(self._ways(row, region)))

    def find_single(self) -> None:
        """Embeddings and the remaining linear layers: the large ones, or all of them if nothing else is split."""
        self._add_single(lambda name: self._share(name) >= _MIN_SHARE)
        if not self.groups:
            self._add_single(lambda name: True)

    def reasons_whole(self) -> dict[str, str]:
        """Why layers stay whole, or are split by themselves only; without small layers that are not linear."""
        for name in self._trace.called:
            kind = type(self._modules[name]).__name__
            if name not in self._taken and self._share(name) >= _MIN_SHARE:
                self.reasons.setdefault(name, f"is a {kind}, which is not a kind of layer that can be split")
        return {
            name: f"is split by itself, because it {reason}" if name in self._taken else reason
            for name, reason in self.reasons.items()
        }

    @property
    def _uneven(self) -> str:
        return f", which {self.size} ranks cannot share evenly"

    def _add(self, ways: list[Group]) -> None:
        self.groups.append(ways[0])
        self.others.extend(ways[1:])
        self._taken.update(ways[0].layers)

    def _features(self, name: str) -> tuple[int, int]:
        found = features(self._modules[name])
        assert found is not None
        return found

    def _share(self, name: str) -> float:
        own = sum(p.numel() for p in self._modules[name].parameters(recurse=False))
        return float(own / self._total)

    def _uneven_in(self, row: str, region: Region) -> str:
        width = self._features(row)[0]
        if width % self.size:
            return f"has {width} inputs{self._uneven}"
        for name in region.columns:
            outputs = self._features(name)[1]
            if not list(sections(outputs, width, self.size)):
                return f"takes its inputs from {name}, which has {outputs} outputs{self._uneven}"
        for path, count in self._integers(row, region).items():
            if region.mixes and _last(path) in _HEADS and count % self.size:
                return f"belongs to {count} heads ({path}){self._uneven}"
        return ""

    def _integers(self, row: str, region: Region) -> dict[str, int]:
        """Integer attributes of the modules that hold the layers."""
        holders = {_parent(name) for name in [row, *region.columns]} | {_common([row, *region.columns])}
        return {
            f"{holder}.{attribute}" if holder else attribute: value
            for holder in sorted(holders)
            for attribute, value in vars(self._modules[holder]).items()
            if type(value) is int and value > 1 and not attribute.startswith("_")
        }

    def _ways(self, row: str, region: Region) -> Iterator[Group]:
        """The ways to split a row and its columns, the most likely first; the last one splits each layer by itself."""
        block, width = _common([row, *region.columns]), self._features(row)[0]
        kind = "attention" if region.mixes else "mlp"
        names = [name[len(block) :].lstrip(".") for name in [*sorted(region.columns), row]]
        key = f"{kind}:{type(self._modules[block]).__name__}:{'+'.join(names)}"
        options = {name: list(sections(self._features(name)[1], width, self.size)) for name in region.columns}
        whole = Group(
            kind=kind, block=block, key=key, layers={**dict.fromkeys(region.columns, "column"), row: "row"},
            dropouts=region.dropouts, partial=tuple(sorted(region.partial)),
            draws={self._trace.number_in(block, draw): dim for draw, dim in region.draws.items()},
        )  # fmt: skip
        for choice in range(max(map(len, options.values()))):
            chosen = {name: ways[min(choice, len(ways) - 1)] for name, ways in options.items()}
            widths = {width, *(length for lengths in chosen.values() for length in lengths)}
            for divided in self._divided(self._integers(row, region), widths, heads=region.mixes):
                yield replace(whole, sections=chosen, divided=divided)
        alone = [name for name in whole.layers if not self._single_refusal(name) and self._share(name) >= _MIN_SHARE]
        yield Group(kind="linear", block=block, key=key, layers=dict.fromkeys(alone, "column_gather"))

    def _divided(self, integers: dict[str, int], widths: set[int], heads: bool) -> Iterable[tuple[str, ...]]:
        known = [path for path in integers if heads and _last(path) in _HEADS]
        wide = [path for path, value in integers.items() if value in widths and path not in known]
        likely = [known, known + wide, [path for path, value in integers.items() if value % self.size == 0], []]
        return dict.fromkeys(tuple(paths) for paths in (likely if heads else [[], wide]))

    def _add_single(self, is_worth: Callable[[str], bool]) -> None:
        for name in self._trace.called:
            module = self._modules[name]
            if name in self._taken or not (features(module) or isinstance(module, nn.Embedding)):
                continue
            # Layers with a tied weight are split with it.
            together = {path for paths in self._owners.values() if name in paths for path in paths} | {name}
            refusals = [reason for path in sorted(together) if (reason := self._single_refusal(path))]
            if refusals:
                self.reasons.setdefault(name, refusals[0])
            elif not is_worth(name):
                self.reasons.setdefault(name, f"holds less than {_MIN_SHARE:.0%} of the parameters")
            else:
                layers = {
                    path: "embedding" if isinstance(self._modules[path], nn.Embedding) else "column_gather"
                    for path in sorted(together)
                }
                kind = "embedding" if "embedding" in layers.values() else "linear"
                self._add([Group(kind=kind, block=name, key=f"{kind}:{name}", layers=layers)])

    def _single_refusal(self, name: str) -> str:
        """Why a layer cannot be split by itself, or an empty string."""
        module = self._modules[name]
        if isinstance(module, nn.Embedding):
            rows = module.num_embeddings
            return table_refusal(module) or (f"has {rows} rows{self._uneven}" if rows % self.size else "")
        if features(module) is None:
            return f"shares a weight with {name}, a {type(module).__name__}"
        outputs = self._features(name)[1]
        return f"has {outputs} outputs{self._uneven}" if outputs % self.size else ""


def sections(outputs: int, width: int, size: int) -> Iterator[tuple[int, ...]]:
    """Possible sections of a column's outputs: each as wide as the row's input; q with narrower k and v; one. Local.

    Args:
        outputs: Outputs of the column.
        width: Inputs of the row that it feeds.
        size: The degree, which divides each section.
    """
    fused = [(width,) * (outputs // width)] if outputs % width == 0 else []
    if outputs > width and (outputs - width) % 2 == 0:
        fused.append((width, (outputs - width) // 2, (outputs - width) // 2))
    for lengths in dict.fromkeys([*fused, (outputs,)]):
        if all(length % size == 0 for length in lengths):
            yield lengths


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _common(paths: Iterable[str]) -> str:
    """The innermost module that contains all of these."""
    shared = []
    for parts in zip(*(_parent(path).split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
