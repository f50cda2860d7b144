"""The attributes of an object that its class keeps in ``__slots__``."""

from __future__ import annotations

import copyreg
from typing import Any

__all__ = ["attributes", "slot_names"]


def slot_names(kind: type) -> list[str]:
    """The names of a class's slots, those of its bases too; private ones as Python stores them. Local."""
    names: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return names


def attributes(value: Any) -> dict[str, Any]:
    """An object's attributes by name, those in ``__slots__`` too. Local."""
    return {**vars(value), **{name: getattr(value, name) for name in slot_names(type(value)) if hasattr(value, name)}}
