"""Steps that a check runs are not seen: what they print is dropped."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

__all__ = ["muted"]


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Context in which what a step prints is dropped: the user has called it for none of these steps."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # which does not enter them as shown: the run is to show them
        yield
