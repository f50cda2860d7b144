"""Who takes a parameter's ``data`` may write there: torch does not count such a write, but here it is announced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["DataWatch", "put_data", "unwatched"]

_GET: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_announce: dict[int, list[Callable[[], None]]] = {}


class DataWatch:
    """Calls back before somebody takes or replaces the ``data`` of certain parameters. Local.

    While there is a watch, ``nn.Parameter`` has a property of that name, before that of its base. So nothing else that
    is done with parameters takes longer, and they keep their class, by which optimizers choose their kernels.

    Args:
        parameters: Which.
        taken: Called with the place of one among them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], taken: Callable[[int], None]) -> None:
        # The parameters stay alive, or their ids might be others'.
        self._calls = [(parameter, functools.partial(taken, i)) for i, parameter in enumerate(parameters)]
        for parameter, call in self._calls:
            _announce.setdefault(id(parameter), []).append(call)
        nn.Parameter.data = property(_get, _set)  # type: ignore[assignment]

    def close(self) -> None:
        """End it; twice is fine."""
        for parameter, call in self._calls:
            calls = _announce[id(parameter)]
            calls.remove(call)
            if not calls:
                del _announce[id(parameter)]
        self._calls = []
        if not _announce and "data" in vars(nn.Parameter):
            del nn.Parameter.data


def unwatched(parameter: nn.Parameter) -> torch.Tensor:
    """Its ``data``, without a call. Local."""
    data: torch.Tensor = _GET(parameter)
    return data


def put_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Replace its ``data``, without a call. Local."""
    _SET(parameter, data)


def _get(parameter: nn.Parameter) -> torch.Tensor:
    for announce in _announce.get(id(parameter), ()):
        announce()
    return unwatched(parameter)


def _set(parameter: nn.Parameter, data: torch.Tensor) -> None:
    for announce in _announce.get(id(parameter), ()):
        announce()
    put_data(parameter, data)
