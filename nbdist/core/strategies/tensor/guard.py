"""Guards tensor-parallel parameters: only the model's forward may read them, the rest of the step may not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nbdist.core.params.placeholder import Placeholders
from nbdist.core.strategies.tensor.apply import Parallelized

__all__ = ["Guard"]


class Guard:
    """Turns split parameters into placeholders, except while the model or a layer of it is in forward.

    A step that read one would get this rank's part. A whole parameter used in a split region has a gradient that is
    summed over ranks: a term that the step added to it would count several times.

    Args:
        parallelized: The model, split.
        read: See `Placeholders`.
    """

    def __init__(self, parallelized: Parallelized, read: Callable[[list[nn.Parameter], bool], None]) -> None:
        model = parallelized.model
        self._parameters = [model.get_parameter(name) for name in sorted({*parallelized.cuts, *parallelized.partial})]
        self._placeholders = Placeholders(read)
        self._active = False
        self._inside: list[list[nn.Parameter]] = []
        guarded = set(self._parameters)
        self._hooks: list[Any] = []
        for module in model.modules():
            if module is model or not guarded.isdisjoint(module.parameters(recurse=False)):
                own = [parameter for parameter in module.parameters() if parameter in guarded]
                self._hooks.append(module.register_forward_pre_hook(self._enter_hook(own), prepend=True))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context for the user's step. Local."""
        self._active = True
        for parameter in self._parameters:
            self._placeholders.hide(parameter)
        try:
            yield
        finally:
            self._active = False
            self._inside.clear()
            for parameter in self._parameters:
                self._placeholders.reveal(parameter)

    @property
    def forbids(self) -> bool:
        """Whether the step is running, outside the model's forward."""
        return self._active and not self._inside

    def close(self) -> None:
        """Remove the hooks. Local."""
        for hook in self._hooks:
            hook.remove()

    def _enter_hook(self, own: list[nn.Parameter]) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._active:
                self._inside.append([] if self._inside else [p for p in own if self._placeholders.reveal(p)])

        return enter

    def _leave(self, *_: Any) -> None:
        if self._inside:
            for parameter in self._inside.pop():
                self._placeholders.hide(parameter)
