"""Every error nbdist raises on purpose.

```
NbdistError                      shown in a notebook as one sentence, without a traceback through our internals
├── PlanError    (ValueError)    an option, or a combination of options, that cannot be run
├── TaskError    (TypeError, ValueError)  a model, data, loss, step, optimizer or metric that cannot be used
├── ClusterError (RuntimeError)  engines that are missing, busy, dead or cannot be started
│   └── EngineError              something failed on an engine; carries the engine's own traceback
└── PeerLostError (RuntimeError) a collective ended because another rank is gone: a secondary failure
```

A message names the wrong value and, in its second half, the cure.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence

__all__ = [
    "ClusterError",
    "EngineError",
    "NbdistError",
    "PeerLostError",
    "PlanError",
    "TaskError",
    "interrupted",
    "ranks_text",
    "suggest",
]


class NbdistError(Exception):
    """The root of the tree above."""

    def add(self, sentence: str) -> None:
        """Append a sentence to the message, on a line of its own."""
        self.args = (f"{self}\n{sentence}", *self.args[1:])

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython prints instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class PlanError(NbdistError, ValueError):
    """An option, or a combination of options, that cannot be run."""


class TaskError(NbdistError, TypeError, ValueError):
    """A model, data, loss, step, optimizer or metric that cannot be used."""


class ClusterError(NbdistError, RuntimeError):
    """Engines that are missing, busy, dead or cannot be started."""


class EngineError(ClusterError):
    """Something failed on an engine.

    Args:
        message: One line: the ranks, the error and the line of the user's code where it happened.
        remote_traceback: The engine's own traceback, with its source lines.
        rank: The first rank that failed.
    """

    def __init__(self, message: str, remote_traceback: str = "", rank: int | None = None) -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        self.rank = rank

    def _render_traceback_(self) -> list[str]:
        lines = self.remote_traceback.rstrip("\n").splitlines()
        return [*lines, "", *super()._render_traceback_()] if lines else super()._render_traceback_()


class PeerLostError(NbdistError, RuntimeError):
    """A collective ended because another rank is gone: a secondary failure, never the cause."""


def interrupted(message: str) -> KeyboardInterrupt:
    """A KeyboardInterrupt that IPython shows as one sentence, without a traceback through our internals."""
    error = KeyboardInterrupt(message)
    error._render_traceback_ = lambda: [f"KeyboardInterrupt: {message}"]  # type: ignore[attr-defined]
    return error


def suggest(word: str, known: Iterable[str], meant: Sequence[str] = ()) -> str:
    """Return " Did you mean 'x'?" for the first one `meant`, else for the nearest known word, or an empty string."""
    near = meant or difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks for display: "rank 3", "ranks 0-2,5"."""
    ordered = sorted(set(ranks))
    groups = []
    for _, run in itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        groups.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"rank{'s' if len(ordered) > 1 else ''} {','.join(groups)}"
