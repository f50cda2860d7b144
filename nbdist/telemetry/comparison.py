"""A comparison of runs: what differs in their plans, the best epoch of each, and their curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from nbdist.errors import PlanError
from nbdist.telemetry.record_reader import past_run
from nbdist.telemetry.report import Report
from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.run_view import chart_image, html_table, mesh_text, text_table
from nbdist.telemetry.svg_chart import Pairs, curves_chart
from nbdist.telemetry.units import duration, number

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Comparison", "compare"]

_LEFT_OUT = ("mesh", "checked", "checkpoint", "resume", "tensorboard")
"""Entries of a plan that are not compared: the mesh has a column of its own, the others change no result."""


def compare(runs: Any) -> Comparison:
    """Compare runs, running or past: what differs in their plans, curves, and the best epoch of each. Local.

    Args:
        runs: A dict from names to runs, or runs alone, which have their ids as names. A run is a `Run`, a `PastRun` or
            the id of a recorded run, of which the beginning is enough.

    Raises:
        PlanError: There are no runs, or something else is among them.
    """
    if isinstance(runs, (Report, str)):
        runs = [runs]
    if not isinstance(runs, Iterable):
        raise PlanError(f"compare takes a dict or a list of runs, not {runs!r}.")
    named = runs.items() if isinstance(runs, Mapping) else ((None, run) for run in runs)
    found: dict[str, Report] = {}
    for name, given in named:
        run = past_run(given) if isinstance(given, str) else given
        if not isinstance(run, Report):
            raise PlanError(f"compare takes runs, or their ids, and {given!r} is neither.")
        found[str(getattr(run, "run_id", "") if name is None else name)] = run
    if not found:
        raise PlanError("compare takes at least one run, and here is none.")
    return Comparison(found)


class Comparison:
    """Runs side by side, as they are when it is shown: a table, and the curves of their losses.

    Args:
        runs: By name.
    """

    def __init__(self, runs: Mapping[str, Report]) -> None:
        self.runs = dict(runs)

    @property
    def measure(self) -> str:
        """By what epochs are compared: the lowest `val_loss`, or `loss` where a run has no validation."""
        rows = [run.history for run in self.runs.values() if run.history]
        return "val_loss" if rows and all("val_loss" in row[0] for row in rows) else "loss"

    @property
    def best(self) -> str | None:
        """The name of the run with the best epoch; None before any has one."""
        rows = {name: row for name, run in self.runs.items() if (row := self._best_row(run.history))}
        return min(rows, key=lambda name: rows[name][self.measure], default=None)

    def to_frame(self) -> DataFrame:
        """A row for each run, by name: the options that differ, and its best epoch, as a pandas DataFrame.

        Raises:
            PlanError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise PlanError("to_frame() needs pandas: pip install pandas.") from None
        states = {name: run.progress for name, run in self.runs.items()}
        differing = _differing(states)
        rows = [differing[name] | (self._best_row(state.history) or {}) for name, state in states.items()]
        return pd.DataFrame(rows, index=pd.Index(list(states), name="run"))

    def _best_row(self, history: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        measure = self.measure
        finite = [row for row in history if (value := row.get(measure)) is not None and math.isfinite(value)]
        return min(finite, key=lambda row: row[measure], default=None)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        states = {name: run.progress for name, run in self.runs.items()}
        differing = _differing(states)
        best = {name: self._best_row(state.history) or {} for name, state in states.items()}
        measured = ["loss", *dict.fromkeys(key for row in best.values() for key in row if key.startswith("val_"))]
        options = list(differing[next(iter(states))])
        rows = [
            (
                name, *(_text(differing[name][option]) for option in options), state.state, f"{state.step:,}",
                str(best[name].get("epoch", "–")), *(number(best[name].get(key)) for key in measured),
                duration(state.elapsed_s),
            )
            for name, state in states.items()
        ]  # fmt: skip
        return ("run", *options, "state", "steps", "best epoch", *measured, "took"), rows

    def _summary(self) -> str:
        count = f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"
        if (best := self.best) is None:
            return f"{count}: none has completed an epoch"
        row = self._best_row(self.runs[best].history) or {}
        return f"{count}: the lowest {self.measure} is {number(row[self.measure])}, of {best} in epoch {row['epoch']}"

    def __repr__(self) -> str:
        return "\n".join(f"nbdist: {line}" for line in [self._summary(), *text_table(*self._table())])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self._summary())}</b></p>"]
        curves = {
            "training loss": {name: _curve(run.progress) for name, run in self.runs.items()},
            "validation loss": {name: _validation(run.progress) for name, run in self.runs.items()},
        }
        charts = [chart for title, pairs in curves.items() if (chart := curves_chart(title, pairs))]
        if charts:
            parts.append(f"<p>{''.join(map(chart_image, charts))}</p>")
        return f'<div class="nbdist">{"".join([*parts, html_table(*self._table())])}</div>'


def _differing(states: Mapping[str, RunState]) -> dict[str, dict[str, Any]]:
    """Of each run, its model, mesh and options, as far as they are not the same for all."""
    described = {
        name: {"model": state.title, "mesh": mesh_text(state.plan)}
        | {option: value for option, value in state.plan.items() if option not in _LEFT_OUT}
        for name, state in states.items()
    }
    known = dict.fromkeys(itertools.chain.from_iterable(described.values()))
    differing = [key for key in known if len({repr(about.get(key)) for about in described.values()}) > 1]
    if "mesh" in differing and "strategy" in differing:
        differing.remove("strategy")
    return {name: {key: about.get(key) for key in differing} for name, about in described.items()}


def _text(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curve(run: RunState) -> Pairs:
    return [(float(point.step), point.mean) for point in run.curve]


def _validation(run: RunState) -> Pairs:
    ends = itertools.accumulate(float(row["steps"]) for row in run.history)
    return [(end, float(row["val_loss"])) for end, row in zip(ends, run.history, strict=True) if "val_loss" in row]
