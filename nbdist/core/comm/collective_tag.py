"""What a collective is for: ranks exchange it with the collective, so that a mismatch is one sentence on each."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from nbdist.errors import PlanError, ranks_text

__all__ = ["TAG_BYTES", "CollectiveTag", "mismatch_error", "tag_of"]

_PACKED = struct.Struct("<IIQ")
TAG_BYTES = _PACKED.size
"""Bytes of a packed tag."""


class CollectiveTag(NamedTuple):
    """What a collective is.

    Args:
        text: For an error.
        packed: For comparison, `TAG_BYTES` long.
    """

    text: str
    packed: bytes


@functools.lru_cache(maxsize=4096)
def tag_of(kind: str, nbytes: int = 0, purpose: str = "") -> CollectiveTag:
    """The tag of a collective. Local.

    Args:
        kind: Such as "all-reduce".
        nbytes: Of this rank's tensor.
        purpose: What it is for, such as "the statistics of norm1"; the same on all ranks.
    """
    size = f" of {nbytes:,} bytes" if nbytes else ""
    packed = _PACKED.pack(zlib.crc32(kind.encode()), zlib.crc32(purpose.encode()), nbytes)
    return CollectiveTag(f"{kind}{size}{f' for {purpose}' if purpose else ''}", packed)


def mismatch_error(texts: Mapping[int, str]) -> PlanError:
    """The error for ranks in different collectives; the same on each.

    Args:
        texts: Of the ranks' tags, by rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks.setdefault(text, []).append(rank)
    spread = ", ".join(f"{ranks_text(some)} in {text}" for text, some in ranks.items())
    return PlanError(
        f"the ranks are in different collectives, which would mix up their numbers: of {len(texts)} ranks, {spread}. "
        "The forward or the step computes other layers on other ranks: compute the same ones on all, or leave out what "
        "needs the ranks' sums in the middle of it (sync_batchnorm, tp)."
    )
