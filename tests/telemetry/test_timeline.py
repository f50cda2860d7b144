"""The timeline of a pipeline step: measured, drawn, and exported."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from nbdist.errors import ClusterError, PlanError
from nbdist.telemetry import JsonlSink, Progress, RankState, RunState, Timeline, Work, Worked
from nbdist.telemetry.record import record_path
from nbdist.telemetry.timeline import bubble

NOW = 1.7e9
SVG = "{http://www.w3.org/2000/svg}"


def at(kind, microbatch, start_ms, end_ms, stage=0):
    return Work(kind, stage, microbatch, NOW + start_ms / 1e3, NOW + end_ms / 1e3)


# Two ranks, two microbatches, gpipe: forward takes 10 ms, backward 20.
FIRST = [at("forward", 0, 0, 10), at("forward", 1, 10, 20), at("backward", 0, 50, 70), at("backward", 1, 70, 90)]
LAST = [
    at("forward", 0, 10, 20, 1), at("forward", 1, 20, 30, 1), at("backward", 0, 30, 50, 1), at("backward", 1, 50, 70, 1)
]  # fmt: skip
TIMELINE = Timeline(7, {1: LAST, 0: FIRST[::-1]})
SPLIT = Timeline(
    8,
    {0: [
        at("forward", 0, 0, 1), at("forward", 10, 1, 30, 1), at("backward", 0, 30, 60),
        at("backward", 10, 60, 90, 1),
    ]},
)  # fmt: skip


def test_what_is_measured():
    """A rank is idle when it does nothing between the first start and the last end of all."""
    assert [0, 1] == list(TIMELINE.work)
    assert pytest.approx(0.090) == TIMELINE.span_s
    assert {0: pytest.approx(1 / 3), 1: pytest.approx(1 / 3)} == TIMELINE.idle_by_rank
    assert pytest.approx(1 / 3) == TIMELINE.idle
    assert 1 / 3 == TIMELINE.bubble, "equal work, no time for messages"


def test_the_formula():
    """One rank has no bubble; more microbatches make it smaller, as do more stages a rank."""
    assert 0.0 == bubble(1, 4)
    assert 3 / 11 == bubble(4, 8)
    assert 3 / 19 == bubble(4, 8, 2)


def test_replicas_are_several_pipelines():
    """With dp=2, pp=2 four ranks are two pipelines of two."""
    four = Timeline(7, {0: FIRST, 1: FIRST, 2: LAST, 3: LAST})
    assert (1 / 3, pytest.approx(1 / 3)) == (four.bubble, four.idle)


def test_as_text():
    """A row a rank, to scale; a label that does not fit is cut to its letter, and no work is omitted."""
    headline, first, last, legend = repr(TIMELINE).splitlines()
    assert "step 7 · 90 ms · idle 33% · bubble 33% by formula" == headline
    assert "F0-----F1------......................B0------------B1-------------" == first.split("|")[1]
    assert ".......F0------F1-----B0-------------B1------------..............." == last.split("|")[1]
    assert "F forward, B backward; then the microbatch" == legend
    row = repr(SPLIT).splitlines()[1]
    assert row.startswith("rank 0 |FF10-----")
    assert "B0-" in row
    assert "B10-" in row
    assert max(map(len, repr(SPLIT).splitlines())) <= 88


def test_as_a_picture():
    """Well-formed, without scripts, with a title; each box names its work and lies at its time."""
    svg = ElementTree.fromstring(TIMELINE.to_svg())
    assert "What each rank of the pipeline did: step 7 · 90 ms" in svg.get("aria-label")
    boxes = {box.find(f"{SVG}title").text: box for box in svg.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None}
    assert 8 == len(boxes)
    first, last = boxes["forward, microbatch 0, stage 0: 10 ms"], boxes["backward, microbatch 1, stage 0: 20 ms"]
    assert float(first.get("x")) < float(last.get("x"))
    assert pytest.approx(2, rel=0.02) == float(last.get("width")) / float(first.get("width"))
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"rank 0", "rank 1", "forward", "backward", "0 ms", "80", "idle 33%"} <= set(texts)
    assert "script" not in TIMELINE.to_svg()


def test_in_a_notebook():
    """As an image with an alt text, which an untrusted notebook shows too."""
    html = TIMELINE._repr_html_()
    (image,) = ElementTree.fromstring(html.replace('"></div>', '"/></div>'))
    assert "What each rank of the pipeline did: step 7 · 90 ms" in image.get("alt")
    assert TIMELINE.to_svg() == base64.b64decode(image.get("src").partition("base64,")[2]).decode()


def test_a_second_stage_has_its_own_shade():
    """And the legend explains it."""
    assert "second stage" not in TIMELINE.to_svg()
    assert "light: second stage of the rank" in SPLIT.to_svg()


def test_a_step_too_short_to_measure():
    """Is drawn too."""
    still = Timeline(1, {0: [at("forward", 0, 0, 0)]})
    assert 0.0 == still.idle
    assert "F" in repr(still)
    ElementTree.fromstring(still.to_svg())


def test_for_perfetto(tmp_path):
    """A process a rank, a thread a stage, microseconds since the start of the step."""
    TIMELINE.save(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert TIMELINE.to_chrome() == trace
    events = trace["traceEvents"]
    names = [(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert [(0, "rank 0"), (0, "stage 0"), (1, "rank 1"), (1, "stage 1")] == names
    complete = [e for e in events if e["ph"] == "X"]
    assert 8 == len(complete)
    last = complete[3]
    assert ("backward 1", 0, 0) == (last["name"], last["pid"], last["tid"])
    assert (pytest.approx(70e3, abs=1), pytest.approx(20e3, abs=1)) == (last["ts"], last["dur"])
    assert {"step": 7, "stage": 0, "microbatch": 1} == last["args"]


def record(rank, steps):
    sink = JsonlSink(record_path("a-run", rank))
    for step in steps:
        sink.emit(Progress(rank=rank, step=step, epoch=1, samples=1, loss=None, samples_per_s=1.0, memory_mib=1.0))
        sink.emit(Worked(rank=rank, step=step, work=tuple([FIRST, LAST][rank])))
    sink.close()


def test_from_a_record():
    """The newest step that all ranks reported, or the requested one; a torn line is left out."""
    record(0, [5, 9, 13])
    record(1, [5, 9])
    with record_path("a-run", 1).open("a") as file:
        file.write('{"event": "Worked", "rank": 1, "st')
    assert (9, TIMELINE.work) == (Timeline.of_record("a-run").step, Timeline.of_record("a-run").work)
    assert 5 == Timeline.of_record("a-run", 5).step
    with pytest.raises(PlanError, match=r"no timeline for step 13 of run 'a-run': .* holds steps 5, 9\."):
        Timeline.of_record("a-run", 13)


def test_nothing_to_draw():
    """A record that is not there, and a run without a pipeline."""
    with pytest.raises(PlanError, match=r"no timeline for run 'no-run': .*no-run holds no step of a pipeline"):
        Timeline.of_record("no-run")
    with pytest.raises(PlanError, match="step 3 has no work of a pipeline"):
        Timeline(3, {0: [], 1: []})


def run_on(mesh, *works):
    from nbdist.cluster.runs.run import Run
    from nbdist.cluster.runs.run_control import RunControl
    from nbdist.cluster.runs.run_spec import RunSpec
    from nbdist.plan import Mesh, Plan

    ranks = {rank: RankState(rank=rank, work=work) for rank, work in enumerate(works)}
    progress = RunState(title="Net", plan={"mesh": {}}, ranks=ranks)
    spec = RunSpec(run_id="r", task=None, plan=Plan(mesh=Mesh(**mesh), epochs=1), title="Net")
    return Run(RunControl(spec, progress, lambda: None))


def test_the_timeline_of_a_run(monkeypatch):
    """Of the newest step; ranks that are a step apart are waited for while the run goes on."""
    works = [Worked(rank=rank, step=7, work=tuple([FIRST, LAST][rank])) for rank in range(2)]
    assert repr(TIMELINE) == repr(run_on({"pp": 2}, *works).timeline())

    apart = run_on({"pp": 2}, works[0], replace(works[1], step=3))
    monkeypatch.setattr(apart.control, "wait", lambda timeout: apart.progress.merge(RankState(rank=1, work=works[1])))
    assert 7 == apart.timeline().step


def test_a_run_without_a_timeline():
    """It has no pipeline, or has not reported a step."""
    with pytest.raises(PlanError, match="a run on dp=2 has no pipeline to draw: train with --strategy pipeline"):
        run_on({"dp": 2}, None, None).timeline()
    early = run_on({"pp": 2}, None, None)
    early.progress.end("stopped")
    with pytest.raises(ClusterError, match="the ranks have reported no step in common"):
        early.timeline()
