"""Pipeline cut points without measuring: at the user's names, at another rank's cuts, or by each stage's parameters."""

from __future__ import annotations

from collections.abc import Sequence

from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.tracing import cannot_split
from nbdist.errors import PlanError, TaskError, suggest

__all__ = ["cut_at_names", "cut_at_nodes", "cut_like"]


def cut_at_nodes(crossings: Crossings, firsts: Sequence[str]) -> list[int]:
    """Bounds from the names of the nodes at which the stages begin, as another rank chose them.

    Raises:
        TaskError: This rank's trace has other nodes.
    """
    missing = [name for name in firsts if name not in crossings.positions]
    if missing:
        raise TaskError(f"the ranks traced different operations of the model (no {missing[0]} here): is it the same?")
    return [0, *(crossings.positions[name] for name in firsts), len(crossings.body)]


def cut_at_names(crossings: Crossings, names: Sequence[str]) -> list[int]:
    """Bounds right before the first operations of the modules or parameters that the user names.

    Raises:
        PlanError: A name does not exist, is never used or out of order, or there can be no cut before it.
    """
    cuts = [_before(crossings, name) for name in names]
    for i in range(1, len(cuts)):
        if cuts[i] <= cuts[i - 1]:
            raise PlanError(f"at= names '{names[i - 1]}' before '{names[i]}', but forward does not reach it first.")
    return [0, *cuts, len(crossings.body)]


def _before(crossings: Crossings, name: str) -> int:
    model = crossings.trace.model
    known = {n for n, _ in model.named_modules()} | set(crossings.names.values())
    if name not in known or not name:
        raise PlanError(f"the model has no module or parameter '{name}' to cut at.{suggest(name, known)}")
    first = next((i for i in range(len(crossings.body)) if _belongs(crossings, i, name)), None)
    if first is None:
        whole = next(
            (p for p in map(crossings.place, range(len(crossings.body))) if p and name.startswith(p + ".")), None
        )
        raise PlanError(
            f"'{name}' is not used in forward."
            if whole is None
            else f"'{name}' is inside '{whole}', which stays whole: cut outside of it, or leave out split_at."
        )
    cut = first
    while cut not in crossings.cut_set and cut > 0 and not crossings.used_by(crossings.body[cut - 1]):
        cut -= 1  # operations without parameters may move to the next stage
    if cut not in crossings.cut_set:
        raise PlanError(
            f"the model cannot be cut right before '{name}': forward begins there, or a value that crosses the cut is "
            "not a tensor, or is written in place later."
        )
    return cut


def _belongs(crossings: Crossings, position: int, name: str) -> bool:
    """Whether a node is in the module `name`, or uses the parameter `name`."""
    node, place = crossings.body[position], crossings.place(position)
    if node.op == "call_module" and name.rpartition(".")[0] == place:
        return name in crossings.used_by(node)
    names = [place] if node.op == "call_module" else [place, *crossings.used_by(node)]
    return any(f"{other}.".startswith(f"{name}.") for other in names)


def cut_like(
    crossings: Crossings, firsts: Sequence[str], holders: dict[str, tuple[int, ...]], unused: set[str]
) -> list[int]:
    """Bounds for another trace of the same model, such that each stage uses only parameters that it holds.

    Args:
        crossings: The other trace.
        firsts: Names of the nodes at which the stages start; the same cuts are used if they exist.
        holders: The stages that hold each parameter and buffer.
        unused: Parameters and buffers that any stage may use.

    Raises:
        TaskError: There are no such cuts.
    """
    model = crossings.trace.model
    needs = _needs(crossings, holders, unused)
    bounds = [0]
    for stage, name in enumerate(firsts, start=1):
        lowest = max([bounds[-1], *(i + 1 for i, need in enumerate(needs) if need is not None and need < stage)])
        highest = next((i for i, need in enumerate(needs) if need is not None and need >= stage), len(crossings.body))
        possible = [c for c in crossings.cuts if lowest <= c <= highest]
        if not possible:
            raise cannot_split(
                model, "", f"in {'training' if model.training else 'evaluation'} mode, or for these shapes, there is "
                f"no place to cut between stages {stage - 1} and {stage}"
            )  # fmt: skip
        same = crossings.positions.get(name)
        bounds.append(same if same in possible else min(possible, key=lambda c: (crossings.edges[c], highest - c)))
    return [*bounds, len(crossings.body)]


def _needs(crossings: Crossings, holders: dict[str, tuple[int, ...]], unused: set[str]) -> list[int | None]:
    """The stage that each node must be in because of its parameters, or None; never decreasing."""
    needs: list[int | None] = []
    stage = 0
    for node in crossings.body:
        names = [name for name in crossings.used_by(node) if name not in unused]
        possible = set.intersection(*(set(holders[name]) for name in names)) if names else set()
        if names:
            stage = min((s for s in possible if s >= stage), default=-1)
            if stage < 0:
                raise cannot_split(crossings.trace.model, "", f"in another mode {names[0]} is used in another order")
        needs.append(stage if names else None)
    return needs
