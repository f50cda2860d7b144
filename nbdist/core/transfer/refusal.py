"""A refusal: something in a value cannot be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbdist.core.transfer.object_path import path_to

__all__ = ["Refusal"]

_CURE = "make it where it is used, in forward or in the step, or leave it out of what is sent"


class Refusal(Exception):
    """Something cannot be sent.

    Args:
        culprit: The object.
        what: What it is, such as "an open file".
        cure: What to do about it.
    """

    def __init__(self, culprit: Any, what: str, cure: str = _CURE) -> None:
        super().__init__(what)
        self.culprit, self.what, self.cure = culprit, what, cure

    @classmethod
    def of(cls, error: Exception, culprit: Any) -> Refusal:
        """The refusal for an error of Python's, or of a user's ``__reduce__``."""
        return cls(culprit, f"a {type(culprit).__name__} ({str(error).rstrip('.') or type(error).__name__})")

    def sentence(self, roots: Mapping[str, Any]) -> str:
        """The sentence for the user, with the path to the object.

        Args:
            roots: What is sent, by the user's names.
        """
        path = path_to(self.culprit, roots)
        where = f"{path} is" if path else f"{' or '.join(roots)} holds"
        return f"{where} {self.what}, which cannot be sent to another process: {self.cure}."
