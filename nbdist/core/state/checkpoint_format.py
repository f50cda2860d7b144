"""The JSON schema of a checkpoint's metadata, checked before any is used: a checkpoint may come from anyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nbdist.core.params.placement import Cut

__all__ = ["FORMATS", "RANK", "cut_of", "fits", "optional_of", "upgraded"]

FORMATS = (2, 3)
"""The versions that are read; the last one is written."""

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_COUNTS = {"steps": int, "samples": int, "loss": (float, float), "seconds": float}
_POSITION = {"epoch": int, "batch": int, "step": int, "samples": int, "history": [dict], "row": _COUNTS}
_TENSOR = {"shape": [int], "dtype": str, "cut": object, "tp": int, "shard": int}
RANK = {
    "rank": int,
    "mesh": str,
    "reports_loss": bool,
    "plan": {"batch_size": int, "seed": int, "shuffle": bool},
    "position": _POSITION,
    "precision": (float, int),
    "schedulers": {str: object},
    "generators": object,
    "tensors": {str: _TENSOR},
    "optimizers": {str: {"groups": [{"params": [str]}], "attributes": dict}},
    "values": {str: dict},
}
"""The schema of each rank's metadata, see `fits`."""

_KEPT = {"step": int, "samples": int, "over_epochs": [str], "values": {str: object}}
OPTIONAL: dict[str, Any] = {
    "made": {str: {**_TENSOR, "persistent": bool}},
    "copies": {"monitor": str, "best_row": int, "best_value": float},
    "extra_state": {"data": int, "states": {str: object}, "changed": [str]},
    "carried": {"slices": int, "kept": {str: _KEPT}},
    "left_out": {str: int},
}
"""The schemas of what not every rank's metadata have.

``made`` are the buffers that a forward has made or given another shape; ``copies`` is a `WeightCopies.state_dict`,
``extra_state`` an `ExtraStates.state_dict`, ``carried`` a `CarriedState.state_dict`, and ``left_out`` has the sum of
each frozen parameter that is not in the checkpoint, see `ShardPlan.frozen_sums`.
"""


_WORDS = {
    "made": "the description of the buffers", "copies": "the state of the copies",
    "extra_state": "the extra state of a module", "carried": "what the step carries",
    "left_out": "the list of what is left out",
}  # fmt: skip


def optional_of(ranks: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What ranks have of `OPTIONAL`, by name.

    Raises:
        ValueError: One is malformed; says which, for the user.
    """
    found = {name: [rank[name] for rank in ranks if name in rank] for name in OPTIONAL}
    for name, values in found.items():
        if not fits(values, [OPTIONAL[name]]):
            raise ValueError(_WORDS[name])
    if not all(index.isdecimal() for one in found["carried"] for index in one["kept"]):
        raise ValueError(_WORDS["carried"])
    return found


def upgraded(rank: Any) -> Any:
    """A rank's metadata in the present format: format 2 held one optimizer and one scheduler, without names."""
    if not isinstance(rank, dict) or not {"groups", "scheduler"} <= rank.keys():
        return rank
    optimizer = {"groups": rank["groups"], "attributes": rank.get("attributes", {})}
    schedulers = {} if rank["scheduler"] is None else {"": rank["scheduler"]}
    return {"optimizers": {"": optimizer}, "schedulers": schedulers, **rank}


def fits(value: Any, schema: Any) -> bool:
    """Whether a JSON value fits a schema.

    Args:
        value: The JSON value.
        schema: A type (`int` is a count, zero or more; `float` any number; `object` anything); a tuple of one schema
            per item; a list of one schema for all items; a dict ``{str: schema}`` for all values; or a dict of the
            required keys.
    """
    if isinstance(schema, tuple):
        return isinstance(value, list) and len(value) == len(schema) and all(map(fits, value, schema))
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(item, schema[0]) for item in value)
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return False
        if str in schema:
            return all(fits(item, schema[str]) for item in value.values())
        return all(key in value and fits(value[key], inner) for key, inner in schema.items())
    if isinstance(value, bool):
        return schema in (bool, object)
    if schema is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, (int, float) if schema is float else schema)


def cut_of(about: dict[str, Any]) -> Cut | None:
    """How a tensor was split over ``tp``, from its entry in `RANK`.

    Raises:
        ValueError: No tensor can be split like that.
    """
    shape, cut = about["shape"], about["cut"]
    if min(about["tp"], about["shard"]) < 1 or about["dtype"] not in _DTYPES:
        raise ValueError
    if cut is None:
        return None
    if not (fits(cut, {"dim": int, "sections": [int]}) and cut["dim"] < len(shape)):
        raise ValueError
    if sum(cut["sections"]) != shape[cut["dim"]] or any(section % about["tp"] for section in cut["sections"]):
        raise ValueError
    return Cut(dim=cut["dim"], sections=tuple(cut["sections"]))
