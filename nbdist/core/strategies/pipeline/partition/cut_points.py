"""Where the cuts go without measuring: by a user's names, by another rank's, or by what each stage holds."""

from __future__ import annotations

from collections.abc import Sequence

from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.tracing import cannot_split
from nbdist.errors import PlanError, TaskError, suggest

__all__ = ["follow", "named", "place_at"]


def named(flow: Crossings, firsts: Sequence[str]) -> list[int]:
    """Bounds from the names of the nodes at which the stages begin, as another rank has chosen them.

    Raises:
        TaskError: This rank has recorded something else.
    """
    missing = [name for name in firsts if name not in flow.positions]
    if missing:
        raise TaskError(f"the ranks record different operations of the model (no {missing[0]} here): is it the same?")
    return [0, *(flow.positions[name] for name in firsts), len(flow.body)]


def place_at(flow: Crossings, names: Sequence[str]) -> list[int]:
    """Bounds right before the first operations of the modules, or of the parameters, that a user names.

    Raises:
        PlanError: A name is not there, is never used, out of order, or nothing can be cut before it.
    """
    cuts = [_before(flow, name) for name in names]
    for i in range(1, len(cuts)):
        if cuts[i] <= cuts[i - 1]:
            raise PlanError(f"at= names '{names[i - 1]}' before '{names[i]}', but forward does not come there first.")
    return [0, *cuts, len(flow.body)]


def _before(flow: Crossings, name: str) -> int:
    model = flow.trace.model
    known = {n for n, _ in model.named_modules()} | set(flow.names.values())
    if name not in known or not name:
        raise PlanError(f"the model has no module or parameter '{name}' to cut at.{suggest(name, known)}")
    first = next((i for i in range(len(flow.body)) if _belongs(flow, i, name)), None)
    if first is None:
        whole = next((p for p in map(flow.place, range(len(flow.body))) if p and name.startswith(p + ".")), None)
        raise PlanError(
            f"'{name}' is not used in forward."
            if whole is None
            else f"'{name}' is inside '{whole}', which stays whole."
        )
    cut = first
    while cut not in flow.legal and cut > 0 and not flow.held(flow.body[cut - 1]):
        cut -= 1  # what has no parameters may as well come after the cut
    if cut not in flow.legal:
        raise PlanError(
            f"nothing can be cut right before '{name}': forward begins there, or what is passed on there is no tensor "
            "or is written in place later."
        )
    return cut


def _belongs(flow: Crossings, position: int, name: str) -> bool:
    """Whether a node is in the module, or works with the parameter, that a user calls `name`."""
    node, place = flow.body[position], flow.place(position)
    if node.op == "call_module" and name.rpartition(".")[0] == place:
        return name in flow.held(node)
    names = [place] if node.op == "call_module" else [place, *flow.held(node)]
    return any(f"{other}.".startswith(f"{name}.") for other in names)


def follow(flow: Crossings, firsts: Sequence[str], holders: dict[str, tuple[int, ...]], idle: set[str]) -> list[int]:
    """Bounds for another recording of the same model, so that each stage needs only what it holds.

    Args:
        flow: The other recording.
        firsts: Names of the nodes at which the stages began: the same cuts are taken, where they are there.
        holders: Parameters and buffers, and the stages that hold them.
        idle: Those of which any stage may make use.

    Raises:
        TaskError: There are no such cuts.
    """
    needs = _needs(flow, holders, idle)
    bounds = [0]
    for stage, name in enumerate(firsts, start=1):
        lowest = max([bounds[-1], *(i + 1 for i, need in enumerate(needs) if need is not None and need < stage)])
        highest = next((i for i, need in enumerate(needs) if need is not None and need >= stage), len(flow.body))
        possible = [c for c in flow.cuts if lowest <= c <= highest]
        if not possible:
            raise cannot_split(
                flow.trace.model, "", f"in {'training' if flow.trace.model.training else 'evaluation'} mode, or for "
                f"these shapes, there is no place to cut between stages {stage - 1} and {stage}"
            )  # fmt: skip
        same = flow.positions.get(name)
        bounds.append(same if same in possible else min(possible, key=lambda c: (flow.edges[c], highest - c)))
    return [*bounds, len(flow.body)]


def _needs(flow: Crossings, holders: dict[str, tuple[int, ...]], idle: set[str]) -> list[int | None]:
    """The stage that each node must be in because of what it holds, or None; never decreasing."""
    needs: list[int | None] = []
    stage = 0
    for node in flow.body:
        names = [name for name in flow.held(node) if name not in idle]
        possible = set.intersection(*(set(holders[name]) for name in names)) if names else set()
        if names:
            stage = min((s for s in possible if s >= stage), default=-1)
            if stage < 0:
                raise cannot_split(flow.trace.model, "", f"in another mode {names[0]} is used in another order")
        needs.append(stage if names else None)
    return needs
