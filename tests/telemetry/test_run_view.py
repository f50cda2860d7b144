"""A run as text and as HTML."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest
from sample_events import FAST, ROW, SLOW, run_of

from nbdist.telemetry import Happening, RankState, RunState, Shares, run_html, run_text
from nbdist.telemetry.run_view import chosen_ranks, epoch_text
from nbdist.telemetry.units import duration, left, number

EVIL = "<script>alert('x')</script> & \"<b>\""


def ended(state="finished", error="", title="Net (12 parameters)"):
    stopped = {key: value for key, value in ROW.items() if key != "val_loss"} | {"epoch": 2}
    run = run_of(dataclasses.replace(FAST, device="cpu", history=(ROW, stopped), memory_mib=1234.4,
                                      shares=Shares(0.7, 0.1, 0.0, 0.2)), SLOW)  # fmt: skip
    run.title = title
    run.end(state, error)
    return run


def test_text_has_the_run_the_history_and_the_ranks():
    """A summary, a row an epoch with a dash for a missing value, a row a rank; each line begins with nbdist."""
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
        ["rank", "device", "state", "step", "loss", "samples/s", "memory", "compute", "comm", "data", "idle"],
        ["0", "cpu", "running", "12", "0.2", "30", "1,234", "MiB", "70%", "10%", "0%", "20%"],
    ] == cells[:-1]


@pytest.mark.parametrize("error", ["ValueError: bad", "ValueError: two\nlines"])
def test_an_error_stands_under_the_summary(error):
    """Each of its lines begins with nbdist, and HTML stays on one line."""
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
    assert {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "img"} == set(parsed.tags)
    assert {"class", "alt", "src"} == {name for name, _ in parsed.attributes}
    assert 4 == "".join(parsed.texts).count(EVIL)


def test_a_run_that_has_not_begun_can_be_drawn():
    """Without a loss, a history or a number of steps."""
    run = run_of(dataclasses.replace(FAST, loss=None, steps_total=None, samples_per_s=0.0, step=0))
    assert " · step 0 · loss – · 0 samples/s · " in run_text(run)
    assert "img" not in Tags(run_html(run)).tags
    assert 1 == Tags(run_html(run)).tags.count("table")


def test_charts_are_images():
    """An untrusted notebook removes an svg element: it is in an image, with its text as alt."""
    images = [dict(parsed) for parsed in [Tags(run_html(ended())).attributes]]
    assert images[0]["alt"].startswith("Loss over 20 steps: from 0.5 to 0.5; on the validation data 0.6")
    kind, _, data = images[0]["src"].partition(",")
    assert "data:image/svg+xml;base64" == kind
    assert base64.b64decode(data).startswith(b"<svg ")


def test_a_run_that_goes_on_says_how_long_still(monkeypatch):
    """With the current learning rate."""
    run = run_of(dataclasses.replace(FAST, lr=3e-4), SLOW)
    monkeypatch.setattr(RunState, "eta_s", 200.0)
    assert re.search(r" · lr 0\.0003 · 50 samples/s · .* s · about 3 min left$", run_text(run).splitlines()[0])


def test_of_many_ranks_those_are_shown_that_need_an_eye():
    """First lost ranks, then slow ones, then the slowest of the others; the rest are counted."""
    ranks = [RankState(rank=r, state="running", busy_s=0.1 + r / 1e4, shares=Shares(1, 0, 0, 0)) for r in range(64)]
    ranks[7] = dataclasses.replace(ranks[7], busy_s=0.5)
    ranks[9] = dataclasses.replace(ranks[9], state="lost")
    run = run_of(*ranks)
    shown, others = chosen_ranks(run, run.standings)
    assert ([9, 7, 63, 62, 61, 60, 59, 58], 56) == ([rank.rank for rank in shown], others)
    lines = run_text(run).splitlines()
    assert lines[-1].split()[1:] == ["56", "others"]
    assert 10 == sum(line.startswith("nbdist: ") for line in lines[1:])


def test_what_happened_stands_with_its_time():
    """The newest, and the number of earlier ones."""
    run = run_of(FAST)
    for i in range(10):
        run.happenings.append(Happening(run.started_s + i, "checkpoint", f"checkpoint of step {i}"))
    lines = run_text(run).splitlines()[1:10]
    assert "nbdist: 2 earlier events are in the record" == lines[0]
    assert ["nbdist: 2.0 s: checkpoint of step 2", "nbdist: 9.0 s: checkpoint of step 9"] == [lines[1], lines[8]]


def test_an_epoch_in_a_line():
    """Loss, validation, speed and time; an epoch that took no time has no speed."""
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.4, "a few seconds"),
        (38, "about 40 s"),
        (100, "about 2 min"),
        (200, "about 3 min"),
        (4900, "about 1 h 20 min"),
        (36000, "about 10 h 00 min"),
    ],
)
def test_what_is_left_is_known_roughly(seconds, text):
    """Rounded as an estimate is."""
    assert text == left(seconds)
