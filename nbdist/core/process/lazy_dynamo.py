"""Optimizers without torch's compiler.

torch's optimizers import the front end of its compiler, `torch._dynamo`, at their first use: a second, and 70 MB in
each process, to mark for it what it must not compile. Where nobody compiles, a placeholder takes those marks instead.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import Any

import torch

__all__ = ["eager"]

_NAME = "torch._dynamo"


class _Placeholder(types.ModuleType):
    """Stands for the compiler while an optimizer runs; asked for anything else than marks, it loads the real one."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self.marked: list[Any] = []

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is being traced."""

    def disable(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Nothing of torch's own is being compiled; it remembers the result in an attribute of `function`."""
        if not (getattr(function, "__module__", None) or "").startswith("torch.optim"):
            return self._real().disable(function, *args, **kwargs)
        self.marked.append(function)
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> types.ModuleType:
        self.remove()
        return importlib.import_module(_NAME)

    def remove(self) -> None:
        """Let the next import find the compiler, and let torch mark anew for it."""
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        if vars(torch).get("_dynamo") is self:
            del torch._dynamo
        for function in self.marked:
            vars(function).pop("__dynamo_disable", None)
        self.marked.clear()


class eager(contextlib.AbstractContextManager[None]):
    """Around what an optimizer does: nothing is loaded for a compiler that is not in use. Local."""

    def __init__(self) -> None:
        self._placeholder: _Placeholder | None = None

    def __enter__(self) -> None:
        if _NAME not in sys.modules:
            self._placeholder = _Placeholder()
            sys.modules[_NAME] = torch._dynamo = self._placeholder

    def __exit__(self, *exc: object) -> None:
        if self._placeholder is not None:
            self._placeholder.remove()
