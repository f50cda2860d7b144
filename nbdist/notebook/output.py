"""The output of ranks, labelled by rank; identical lines of several ranks are printed once."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from IPython.display import display

from nbdist.errors import ranks_text

__all__ = ["RankPrinter", "StatusLine", "label", "merge", "show_rich"]

Printed = Callable[[str], dict[int, str]]


def label(ranks: list[int]) -> str:
    """The label of output of `ranks`: "[0]", "[0-2,5]"."""
    return f"[{ranks_text(ranks).partition(' ')[2]}]"


def merge(texts: dict[int, str]) -> list[str]:
    """Label the lines of every rank; a line that all ranks printed appears once.

    Args:
        texts: Complete lines by rank.

    Returns:
        Labelled lines: blocks that all ranks share, and in between each group of ranks in turn.
    """
    lines = {rank: [_visible(line) for line in _lines(text)] for rank, text in texts.items()}
    columns = list(itertools.zip_longest(*lines.values()))
    merged: list[str] = []
    for same, run in itertools.groupby(range(len(columns)), key=lambda i: len(set(columns[i])) == 1):
        rows = list(run)
        blocks: dict[tuple[str, ...], list[int]] = {}
        for position, rank in enumerate(lines):
            block = tuple(columns[i][position] for i in rows if columns[i][position] is not None)
            blocks.setdefault(block, []).append(rank)
        for block, ranks in blocks.items():
            merged += [f"{label(ranks)} {line}" for line in block]
        assert not same or len(blocks) == 1
    return merged


def _lines(text: str) -> list[str]:
    """Lines as a terminal shows them: ``str.splitlines`` would also split at each carriage return."""
    return text.removesuffix("\n").split("\n") if text else []


def _visible(line: str) -> str:
    """The visible end of a line that carriage returns overwrite, as progress bars do."""
    return line.rstrip("\r").rpartition("\r")[2]


class RankPrinter:
    """Prints the output of ranks: every `interval_s` seconds, and the rest when they are done.

    Args:
        printed: Returns the text of a stream so far, by rank.
        interval_s: How long to collect lines, so that equal lines of other ranks can be merged.
    """

    def __init__(self, printed: Printed, interval_s: float = 1.0) -> None:
        self._printed = printed
        self._interval_s = interval_s
        self._since_s: float | None = None  # when the oldest unprinted line was seen
        self._shown: dict[tuple[str, int], int] = {}

    def poll(self) -> None:
        """Print new complete lines, once other ranks have had `interval_s` to print the same."""
        if not any(self._new(stream, complete=False) for stream in ("stdout", "stderr")):
            return
        if self._since_s is None:
            self._since_s = time.monotonic()
        elif time.monotonic() - self._since_s >= self._interval_s:
            self._since_s = None
            self.flush(complete=False)

    def flush(self, complete: bool = True) -> None:
        """Print what is new.

        Args:
            complete: Whether to print an unfinished last line too.
        """
        self._flush("stdout", sys.stdout, complete)
        self._flush("stderr", sys.stderr, complete)

    def _flush(self, stream: str, to: IO[str], complete: bool) -> None:
        new = self._new(stream, complete)
        for rank, text in new.items():
            self._shown[stream, rank] = self._shown.get((stream, rank), 0) + len(text)
        for line in merge(new):
            print(line, file=to)

    def _new(self, stream: str, complete: bool) -> dict[int, str]:
        """The unprinted output of each rank that has any."""
        new = {}
        for rank, text in self._printed(stream).items():
            start = self._shown.get((stream, rank), 0)
            end = len(text) if complete else text.rfind("\n") + 1
            if end > start:
                new[rank] = text[start:end]
        return new


def show_rich(results: dict[int, Any], what: str) -> None:
    """Show MIME bundles of ranks; equal bundles once.

    Args:
        results: A bundle by rank.
        what: A word behind the label, such as "Out".
    """
    groups: list[tuple[Any, list[int]]] = []
    for rank, bundle in results.items():
        for known, ranks in groups:
            if known == bundle:
                ranks.append(rank)
                break
        else:
            groups.append((bundle, [rank]))
    for bundle, ranks in groups:
        if set(bundle) == {"text/plain"}:
            text = bundle["text/plain"]
            print(f"{label(ranks)} {what}:{chr(10) if chr(10) in text else ' '}{text}")
        else:
            print(f"{label(ranks)} {what}:")
            display(bundle, raw=True)


class StatusLine:
    """One line that shows the current action, and at the end the result.

    Args:
        live: Whether a front end shows it and can change it; a terminal gets the result only.
        failed: What it shows after an error.
    """

    def __init__(self, live: bool, failed: str = "not started") -> None:
        self._live = live
        self._failed = failed
        self._shown = ""
        self._display: Any = None

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and self._shown:
            self.end(self._failed)

    def report(self, words: str) -> None:
        """Show what is being done."""
        if self._live and words != self._shown:
            self._show(f"{words} ...")
            self._shown = words

    def end(self, words: str) -> None:
        """Show what was done."""
        if self._live:
            self._show(words)
        else:
            print(words)

    def _show(self, words: str) -> None:
        if self._display is None:
            self._display = display({"text/plain": words}, raw=True, display_id=True)
        else:
            self._display.update({"text/plain": words}, raw=True)
