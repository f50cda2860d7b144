"""The one function that the kernel sends to an engine: it calls the others by name, so the kernel loads none."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["run"]


def run(name: str, *arguments: Any) -> Any:
    """Call a function of `remote_calls`. Runs on an engine; the import here loads torch if needed."""
    return getattr(importlib.import_module("nbdist.engine.remote_calls"), name)(*arguments)
