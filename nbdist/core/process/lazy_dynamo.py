"""Optimizers without the import of torch's compiler, `torch._dynamo`.

torch's optimizers import `torch._dynamo` at their first use, only to mark functions that it must not compile: a second,
and 70 MB in each process. If nothing is compiled, a fake module takes those marks instead.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import Any

import torch

__all__ = ["skip_dynamo_import"]

_NAME = "torch._dynamo"


class _FakeDynamo(types.ModuleType):
    """In `sys.modules` for `torch._dynamo` while an optimizer runs; any use but marking imports the real module."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self.marked: list[Any] = []

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: nothing is being traced."""

    def disable(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return `function` itself. torch caches the result in an attribute of `function`, which `remove` deletes."""
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
        """Let the next import load the real module, and let torch mark its functions again."""
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        if vars(torch).get("_dynamo") is self:
            del torch._dynamo
        for function in self.marked:
            vars(function).pop("__dynamo_disable", None)
        self.marked.clear()


class skip_dynamo_import(contextlib.AbstractContextManager[None]):
    """Context in which an optimizer does not import `torch._dynamo`, unless it is already imported. Local."""

    def __init__(self) -> None:
        self._fake: _FakeDynamo | None = None

    def __enter__(self) -> None:
        if _NAME not in sys.modules:
            self._fake = _FakeDynamo()
            sys.modules[_NAME] = torch._dynamo = self._fake

    def __exit__(self, *exc: object) -> None:
        if self._fake is not None:
            self._fake.remove()
