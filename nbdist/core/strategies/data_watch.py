"""Who takes a parameter's ``data`` may write there: torch does not count such a write, but here it is announced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["DataWatch", "put_data", "unwatched"]

_GET: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_announce: dict[int, Callable[[], None]] = {}


class DataWatch:
    """Calls back before somebody takes or replaces the ``data`` of certain parameters. Local.

    While there is a watch, ``nn.Parameter`` has a property of that name, before that of its base. So nothing else that
    is done with parameters takes longer, and they keep their class, by which optimizers choose their kernels.

    Args:
        parameters: Which.
        taken: Called with the place of one among them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], taken: Callable[[int], None]) -> None:
        self._parameters = list(parameters)  # alive, or their ids might be others'
        for i, parameter in enumerate(self._parameters):
            _announce[id(parameter)] = lambda i=i: taken(i)  # type: ignore[misc]
        nn.Parameter.data = property(_get, _set)  # type: ignore[assignment]

    def close(self) -> None:
        """End it; twice is fine."""
        for parameter in self._parameters:
            _announce.pop(id(parameter), None)
        self._parameters = []
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
    if (announce := _announce.get(id(parameter))) is not None:
        announce()
    return unwatched(parameter)


def _set(parameter: nn.Parameter, data: torch.Tensor) -> None:
    if (announce := _announce.get(id(parameter))) is not None:
        announce()
    put_data(parameter, data)
