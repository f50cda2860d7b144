"""Callbacks on access to ``Parameter.data``: writes through it do not raise torch's version counter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["DataWatch", "get_data", "set_data"]

_GET: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_callbacks: dict[int, list[Callable[[], None]]] = {}


class DataWatch:
    """Calls back before the ``data`` of certain parameters is read or replaced. Local.

    While there is a watch, ``nn.Parameter`` has a property ``data``, which hides that of ``torch.Tensor``. So no other
    use of parameters gets slower, and they keep their class, by which optimizers choose their kernels.

    Args:
        parameters: The parameters to watch.
        on_access: Called with the parameter's index.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_access: Callable[[int], None]) -> None:
        # The parameters are kept alive, so that their ids are not reused.
        self._calls = [(parameter, functools.partial(on_access, i)) for i, parameter in enumerate(parameters)]
        for parameter, call in self._calls:
            _callbacks.setdefault(id(parameter), []).append(call)
        nn.Parameter.data = property(_get, _set)  # type: ignore[assignment]

    def close(self) -> None:
        """End the watch; twice is fine."""
        for parameter, call in self._calls:
            calls = _callbacks[id(parameter)]
            calls.remove(call)
            if not calls:
                del _callbacks[id(parameter)]
        self._calls = []
        if not _callbacks and "data" in vars(nn.Parameter):
            del nn.Parameter.data


def get_data(parameter: nn.Parameter) -> torch.Tensor:
    """``parameter.data``, without a callback. Local."""
    data: torch.Tensor = _GET(parameter)
    return data


def set_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """``parameter.data = data``, without a callback. Local."""
    _SET(parameter, data)


def _get(parameter: nn.Parameter) -> torch.Tensor:
    for callback in _callbacks.get(id(parameter), ()):
        callback()
    return get_data(parameter)


def _set(parameter: nn.Parameter, data: torch.Tensor) -> None:
    for callback in _callbacks.get(id(parameter), ()):
        callback()
    set_data(parameter, data)
