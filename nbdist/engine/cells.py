"""Cells on an engine: what is prepared before ipykernel executes one, and the namespace that they share.

The source itself arrives as an execute request of ipyparallel, right after `prepare_cell`.
"""

from __future__ import annotations

import sys
from typing import Any

from IPython import get_ipython

from nbdist.core.transfer.payload import pack, unpack
from nbdist.engine import checked_collectives
from nbdist.engine.follow.cell_sources import tie_classes
from nbdist.engine.follow.changes import NotebookUpdate
from nbdist.engine.follow.install import install
from nbdist.upstream.torch_private import ThreadModes

__all__ = ["complete", "namespace", "prepare_cell", "pull", "push", "tie"]


class _Pulled:
    segment: Any = None  # of the last value that was pulled from here: it lives until the next one


def namespace() -> dict[str, Any]:
    """The namespace in which cells run."""
    return get_ipython().user_ns


def push(update: NotebookUpdate, payload: Any) -> None:
    """Assign the values of a packed dict in the namespace of this engine's cells."""
    install(update)
    namespace().update(unpack(payload))


def pull(name: str, by_file: bool) -> Any:
    """Pack the value of a name in the namespace of this engine's cells; see `pack` for `by_file`."""
    values = namespace()
    if name not in values:
        raise NameError(name)
    payload, _Pulled.segment = pack(values[name], by_file=by_file)
    return payload


def complete(source: str) -> tuple[str, list[str]]:
    """Tab completion: the word at the end of `source`, and its completions here."""
    line = source.rpartition("\n")[2]
    completer = get_ipython().Completer
    completer.use_jedi = False  # it parses sources for half a second; the live objects suffice
    word, found = completer.complete(None, line, len(line))
    return word, list(found)


def prepare_cell(update: NotebookUpdate, number: int | None, only_ranks: list[int] | None = None) -> None:
    """Prepare for the cell that the kernel sends next.

    Args:
        update: Of the notebook.
        number: The cell's execution count in the notebook, if it has one.
        only_ranks: The ranks that run it; None for all ranks.
    """
    if notes := install(update):
        _print_with_cell(notes)
    torch_state = ThreadModes()  # an interrupt may land in the first line of a context, which then stays open
    events = get_ipython().events
    if only_ranks is None:
        checked_collectives.allow_all()
    else:
        checked_collectives.allow_only(only_ranks)

    def ended(result: Any) -> None:
        events.unregister("post_run_cell", ended)
        checked_collectives.allow_all()
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            torch_state.put_back()

    events.register("post_run_cell", ended)
    if number is not None:
        get_ipython().execution_count = number


def _print_with_cell(notes: list[str]) -> None:
    """Print notes when the next cell begins, so that they are part of what it prints."""
    events = get_ipython().events

    def began(info: Any) -> None:
        events.unregister("pre_run_cell", began)
        print(*(f"nbdist: {note}" for note in notes), sep="\n", file=sys.stderr)

    events.register("pre_run_cell", began)


def tie(update: NotebookUpdate, marks: dict[str, str]) -> None:
    """Make classes that one cell defined here and in the notebook identical."""
    install(update)
    tie_classes(marks, namespace())
