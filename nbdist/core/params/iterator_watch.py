"""Whether code takes from one of some iterators, which nobody can put back."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Any

from nbdist.core.params.program_state import is_of_library

__all__ = ["IteratorWatch"]


class IteratorWatch:
    """A context that watches iterators of this thread, with Python's profiling hook. Local.

    A generator, or one of a Python class, is seen when its code runs. Of one that is written in C only a call of
    ``next()`` in the user's code is seen, and not of which.

    Args:
        iterators: The iterators.

    Attributes:
        taken: Whether something was taken from one.
    """

    def __init__(self, iterators: Iterable[Any]) -> None:
        self.taken = False
        self._iterators = list(iterators)
        self._in_c = any(type(each).__flags__ & _HEAP_TYPE == 0 for each in self._iterators if not _is_generator(each))

    def __enter__(self) -> IteratorWatch:
        self._before = sys.getprofile()
        if self._iterators:
            sys.setprofile(self._seen)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._iterators:
            sys.setprofile(self._before)

    def _seen(self, frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            self.taken |= self._in_c and called is next and not is_of_library(frame.f_code)
        elif event == "call":
            first = next(iter(frame.f_locals.values()), None) if frame.f_code.co_name == "__next__" else None
            self.taken |= any(
                getattr(each, "gi_frame", None) is frame or (first is not None and each is first)
                for each in self._iterators
            )


_HEAP_TYPE = 1 << 9
"""The flag of a class that is made in Python."""


def _is_generator(value: Any) -> bool:
    return isinstance(value, types.GeneratorType)
