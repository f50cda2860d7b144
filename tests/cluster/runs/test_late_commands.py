"""Late commands, given after a run's last step: each has one outcome, in the run's notes and its record."""

from __future__ import annotations

import threading
import time

import pytest
from gate import Gate
from shared_cluster import ENGINES, HUNG_S, until
from tasks import classes, net

import nbdist
from nbdist.cluster.engines.spares import Spares
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.errors import ClusterError, EngineError

pytestmark = pytest.mark.engines

STEPS = 3
OPTIONS = {"loss": "cross_entropy", "steps": STEPS, "batch_size": 16, "threads": 1, "check": "no"}


@pytest.fixture
def scaled(cluster):
    """The running cluster, which has its two engines again afterwards."""
    yield cluster
    if cluster.size != ENGINES:
        cluster.scale(ENGINES)


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def evaluated(scaled, gate, tmp_path):
    """A run whose last step is done, and that is evaluated until the gate opens."""
    started = tmp_path / "started"

    def measured(output, target):
        started.touch()
        while not gate.exists():
            time.sleep(0.005)
        return (output.argmax(1) == target).double().mean()

    run = scaled.train(net(), classes(), val=classes(), metric=measured, background=True, **OPTIONS)
    until(started.exists)
    return run


@pytest.mark.parametrize(
    ("give", "note"),
    [
        (lambda run: run.pause(), "pause came after step 3, the last one: not carried out"),
        (lambda run: run.resume(), "resume came after step 3, the last one: not carried out"),
        (lambda run: run.set_lr(0.25), "learning rate 0.25 came after step 3, the last one: not carried out"),
        (lambda run: run.checkpoint("/no"), "checkpoint in /no came after step 3, the last one: not carried out"),
        (lambda run: run.stop(), "stop came after step 3, the last one: the run was over"),
    ],
    ids=["pause", "resume", "lr", "checkpoint", "stop"],
)  # fmt: skip
def test_a_command_during_the_last_evaluation_is_noted(evaluated, gate, give, note):
    """In the run and in its record; the run ends as it would have."""
    give(evaluated)
    gate.touch()
    evaluated.wait()
    assert ("finished", STEPS, [note]) == (evaluated.state, evaluated.progress.step, evaluated.progress.notes)
    assert "val_measured" in evaluated.history[-1]
    (past,) = nbdist.past_runs()
    assert ("finished", [note]) == (past.state, past.progress.notes)


@pytest.mark.parametrize(
    ("give", "size", "note"),
    [
        (lambda cluster: cluster.current_run.stop(), 2,
         "stop came in step 3, the last one: it changes nothing"),
        (lambda cluster: cluster.scale(3), 3, "scaled to 3 after step 3"),
    ],
    ids=["stop", "scale"],
)  # fmt: skip
def test_a_command_in_the_last_step_does_not_change_the_end(scaled, tmp_path, give, size, note):
    """Including the last evaluation; a scale has its engines then."""
    gate = Gate(tmp_path, STEPS - 1)
    options = OPTIONS | {"val": classes(), "metric": "accuracy", "lr_scheduler": gate}
    run = scaled.train(net(), classes(), background=True, **options)
    gate.wait(STEPS - 1, run=run)
    give(scaled)
    gate.open()
    run.wait()
    assert ("finished", STEPS, size) == (run.state, run.progress.step, scaled.size)
    assert {"val_loss", "val_accuracy"} <= set(run.history[-1])
    assert [note] == [happening.text for happening in run.progress.happenings]


def test_a_stop_at_once_interrupts_the_last_evaluation(evaluated):
    """The weights after the last step are loaded."""
    evaluated.stop(now=True)
    evaluated.wait()
    assert ("stopped", STEPS) == (evaluated.state, evaluated.progress.step)
    assert ["stopped at once after step 3"] == evaluated.progress.notes
    assert [] == evaluated.history


def test_a_late_scale_has_its_engines_at_the_end(evaluated, scaled, gate):
    """The last number counts; the other one is noted too."""
    scaled.scale(1)
    scaled.scale(3)
    gate.touch()
    evaluated.wait()
    assert ("finished", STEPS, 3) == (evaluated.state, evaluated.progress.step, scaled.size)
    assert [
        "scale to 1 came after step 3, the last one: not carried out",
        "scale to 3 came after step 3, the last one: there are 3 engines",
    ] == evaluated.progress.notes


def test_after_a_failed_late_scale_the_next_run_works(evaluated, scaled, gate, monkeypatch):
    """Its ranks form a new world; the note says that the scale failed."""

    def refused(*_):
        raise ClusterError("no engine came")

    scaled.scale(3)
    with monkeypatch.context() as patch:
        patch.setattr(Spares, "take", refused)
        gate.touch()
        evaluated.wait()
    assert ["scale to 3 came after step 3, the last one: not carried out (no engine came)"] == evaluated.progress.notes
    assert not scaled._up.formed
    assert "finished" == scaled.train(net(), classes(), **OPTIONS).state


def test_a_late_scale_works_though_the_run_failed(scaled, gate, tmp_path):
    """After an error in the last evaluation too."""
    started = tmp_path / "started"

    def measured(output, target):
        started.touch()
        while not gate.exists():
            time.sleep(0.005)
        raise ValueError("not today")

    run = scaled.train(net(), classes(), val=classes(), metric=measured, background=True, **OPTIONS)
    until(started.exists)
    scaled.scale(3)
    run.set_lr(0.5)
    gate.touch()
    with pytest.raises(EngineError, match="not today"):
        run.wait()
    assert 3 == scaled.size
    assert [
        "scale to 3 came after step 3, the last one: there are 3 engines",
        "learning rate 0.5 came after step 3, the last one: not carried out",
    ] == run.progress.notes[-2:]


def test_a_command_while_the_result_is_loaded_is_noted(cluster, monkeypatch):
    """All ranks have returned by then; later commands are refused."""
    coming, proceed = threading.Event(), threading.Event()
    load_result = RunDispatch.load_result

    def held(self, home):
        coming.set()
        assert proceed.wait(HUNG_S)
        load_result(self, home)

    monkeypatch.setattr(RunDispatch, "load_result", held)
    run = cluster.train(net(), classes(), background=True, **OPTIONS)
    try:
        assert coming.wait(HUNG_S)
        run.pause()
    finally:
        proceed.set()
    run.wait()
    assert ["pause came after step 3, the last one: not carried out"] == run.progress.notes
    with pytest.raises(ClusterError, match="has finished: start another one"):
        run.pause()


def test_two_stops_are_one_command(cluster, gate, tmp_path):
    """The second leaves no note."""
    started = tmp_path / "started"

    def loss(output, target):
        started.touch()
        while not gate.exists():
            time.sleep(0.005)
        return output.square().mean()

    run = cluster.train(net(), classes(), background=True, **{**OPTIONS, "loss": loss, "steps": 10**9})
    until(started.exists)
    run.stop()
    run.stop()
    gate.touch()
    run.wait()
    assert [f"stopped after step {run.progress.step:,}"] == [h.text for h in run.progress.happenings]
