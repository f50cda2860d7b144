"""Packing what a person supplied, so that what cannot be sent is named."""

from __future__ import annotations

from typing import Any

from nbdist.errors import TaskError

__all__ = ["pack"]


def pack(value: Any, name: str, **options: Any) -> tuple[Any, Any]:
    """`handover.pack`, whose errors then begin with what a person calls the value."""
    from nbdist.core.handover import pack as packed

    try:
        return packed(value, **options)
    except TaskError as error:
        raise TaskError(f"{name}: {error}") from error.__cause__
