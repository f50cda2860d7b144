"""Split parameters, out of reach of what is computed beside the model's forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nbdist.core.params.placeholder import Placeholders
from nbdist.core.strategies.tensor.apply import Parallelized

__all__ = ["Guard"]


class Guard:
    """Makes placeholders of split parameters, but for the time in which the model, or a layer of it, computes.

    A step that reads one sees a part. One that is whole, and used in a split region, has a gradient that ranks add up:
    what the step adds to it would count several times.

    Args:
        parallelized: The model, split.
        read: See `Placeholders`.
    """

    def __init__(self, parallelized: Parallelized, read: Callable[[list[nn.Parameter], bool], None]) -> None:
        model = parallelized.model
        self._parameters = [model.get_parameter(name) for name in sorted({*parallelized.cuts, *parallelized.partial})]
        self._placeholders = Placeholders(read)
        self._up = False
        self._inside: list[list[nn.Parameter]] = []
        mine = set(self._parameters)
        self._hooks: list[Any] = []
        for module in model.modules():
            if module is model or not mine.isdisjoint(module.parameters(recurse=False)):
                own = [parameter for parameter in module.parameters() if parameter in mine]
                self._hooks.append(module.register_forward_pre_hook(self._entering(own), prepend=True))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Around the step. Local."""
        self._up = True
        for parameter in self._parameters:
            self._placeholders.hide(parameter)
        try:
            yield
        finally:
            self._up = False
            self._inside.clear()
            for parameter in self._parameters:
                self._placeholders.reveal(parameter)

    @property
    def forbids(self) -> bool:
        """Whether the step computes now, beside the model's forward."""
        return self._up and not self._inside

    def close(self) -> None:
        """Take the hooks away. Local."""
        for hook in self._hooks:
            hook.remove()

    def _entering(self, own: list[nn.Parameter]) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._up:
                self._inside.append([] if self._inside else [p for p in own if self._placeholders.reveal(p)])

        return enter

    def _leave(self, *_: Any) -> None:
        if self._inside:
            for parameter in self._inside.pop():
                self._placeholders.hide(parameter)
