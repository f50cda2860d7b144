"""A run as text and as HTML."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from told import FAST, ROW, SLOW, run_of

from nbdist.telemetry import run_html, run_text
from nbdist.telemetry.view import duration, epoch_text, number

EVIL = "<script>alert('x')</script> & \"<b>\""


def ended(state="finished", error="", title="Net (12 parameters)"):
    stopped = {key: value for key, value in ROW.items() if key != "val_loss"} | {"epoch": 2}
    run = run_of(dataclasses.replace(FAST, device="cpu", history=(ROW, stopped), memory_mib=1234.4), SLOW)
    run.title = title
    run.end(state, error)
    return run


def test_text_has_the_run_the_history_and_the_ranks():
    """A summary, a row an epoch with a dash where nothing was measured, a row a rank; each line says who speaks."""
    lines = run_text(ended()).splitlines()
    assert all(line.startswith("nbdist: ") for line in lines)
    assert re.fullmatch(
        r"nbdist: Net \(12 parameters\) on dp=2 · finished · step 11/20 · loss 0\.5 · 160 samples/s · \d\.\d s",
        lines[0],
    )
    cells = [line.split()[1:] for line in lines[1:]]
    assert [
        ["epoch", "steps", "samples", "loss", "seconds", "val_loss"],
        ["1", "10", "320", "0.5", "2", "0.6"],
        ["2", "10", "320", "0.5", "2", "–"],
        ["rank", "device", "state", "step", "loss", "samples/s", "memory"],
        ["0", "cpu", "running", "12", "0.2", "30", "1,234", "MiB"],
    ] == cells[:-1]


@pytest.mark.parametrize("error", ["ValueError: bad", "ValueError: two\nlines"])
def test_an_error_stands_under_the_summary(error):
    """Each of its lines says who speaks, and HTML stays on one line."""
    run = ended("failed", error)
    assert [f"nbdist: {line}" for line in error.splitlines()] == run_text(run).splitlines()[1:][: error.count("\n") + 1]
    assert "\n" not in run_html(run)
    assert error.replace("\n", "<br>") in run_html(run)


def test_notes_stand_under_the_error():
    """In text a line each, in HTML as text."""
    run = ended("failed", "ValueError: bad")
    run.note("one is lost")
    run.note(EVIL)
    lines = ["nbdist: ValueError: bad", "nbdist: one is lost", f"nbdist: {EVIL}"]
    assert lines == run_text(run).splitlines()[1:4]
    assert {"ValueError: bad", "one is lost"} <= set(Tags(run_html(run)).texts)
    assert "<script" not in run_html(run)
    run.error = ""
    assert lines[1:] == run_text(run).splitlines()[1:3]


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_html_is_static_and_escapes_what_users_wrote():
    """No script, no style, and names and errors are text."""
    run = ended("failed", error=EVIL, title=EVIL)
    run.ranks[1] = dataclasses.replace(run.ranks[1], device=EVIL)
    run.ranks[0] = dataclasses.replace(run.ranks[0], history=({**ROW, f"val_{EVIL}": 1.0},))
    html = run_html(run)
    parsed = Tags(html)
    assert {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"} == set(parsed.tags)
    assert [("class", "nbdist")] == parsed.attributes
    assert 4 == "".join(parsed.texts).count(EVIL)


def test_a_run_that_has_not_begun_can_be_drawn():
    """Without a loss, a history or a number of steps."""
    run = run_of(dataclasses.replace(FAST, loss=None, steps_total=None, samples_per_s=0.0, step=0))
    assert " · step 0 · loss – · 0 samples/s · " in run_text(run)
    assert 1 == Tags(run_html(run)).tags.count("table")


def test_an_epoch_in_a_line():
    """Loss, what was validated, speed and time; an epoch that took no time has no speed."""
    assert "epoch 1  loss 0.5  val_loss 0.6  160 samples/s  2.0 s" == epoch_text(ROW)
    assert "  0 samples/s  " in epoch_text({**ROW, "seconds": 0.0})


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.123456, "0.1235"), (999, "999"), (1234.5, "1,234"), (-5000, "-5,000"),
     (1e-7, "1e-07"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    """Four digits, thousands with a comma."""
    assert text == number(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (12.3, "12.3 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_seconds_for_people(seconds, text):
    """In the unit that fits."""
    assert text == duration(seconds)
