"""Recovery: after killed engines, errors and stops a run resumes, with the bits of an undisturbed one."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from gate import Gate
from shared_cluster import until
from torch import nn

import nbdist
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.hosts.local_host import LocalHost
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.monitor import RunMonitor
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.errors import EngineError, PlanError
from nbdist.telemetry.record import records

pytestmark = pytest.mark.engines

SAMPLES, BATCH, EPOCHS = 320, 16, 3
HELD, TRAPPED = 15, 30  # after which step a run is held, and in which one its trap is; it has 60


class Net(nn.Module):
    """On `trap` = (rank, forward) it leaves a `mark` and does what `how` says."""

    counts = False

    def __init__(self, trap=(), how="", mark=os.devnull):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        self.trap, self.how, self.mark, self.calls = trap, how, mark, 0

    def forward(self, x):
        if self.trap or self.counts:  # a pipeline would refuse a forward that counts
            self.calls += self.training
        if self.training and self.trap == (int(os.environ.get("RANK", 0)), self.calls):
            Path(self.mark).touch()
            if self.how == "raise":
                raise ValueError("torn")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "sleep":
                time.sleep(1000)
            while self.how == "in C":
                ctypes.CDLL(None).sleep(1000)
        return self.layers(x)


def net(*trap):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(*trap)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 6, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def falling(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=500)


OPTIONS = {
    "loss": "cross_entropy",
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "lr_scheduler": falling,
    "threads": 1,
    "check": "no",
}


def bits(model):
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


def rows(run):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.history]


@pytest.fixture(scope="module")
def undisturbed(shared_cluster):
    """The weights and the history of an undisturbed run."""
    cluster = shared_cluster.ready()
    model = net()
    run = cluster.train(model, data(), **OPTIONS)
    return bits(model), rows(run)


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_killed_engines_change_no_bit(cluster, undisturbed, tmp_path, victims):
    """The run recovers on other engines; its notes and record say what happened."""
    model, pids, gate = net(), [engine.pid for engine in cluster.engines], Gate(tmp_path, HELD, scheduler=falling)
    run = cluster.train(model, data(), background=True, **OPTIONS | {"lr_scheduler": gate})
    gate.wait(HELD, run=run)
    for rank in victims:
        os.kill(pids[rank], signal.SIGKILL)
    gate.open(HELD)
    assert "finished" == run.wait().state
    assert undisturbed == (bits(model), rows(run))
    assert victims == [rank for rank, engine in enumerate(cluster.engines) if engine.pid != pids[rank]]
    (note,) = run.progress.notes
    assert "lost (its process ended), replaced in" in note
    assert note in repr(run)
    events = [json.loads(line) for line in (records() / run.run_id / "cluster.jsonl").read_text().splitlines()]
    assert [*("Recovered" for _ in victims), "Noted"] == [event["event"] for event in events]
    assert victims == [event["rank"] for event in events if event["event"] == "Recovered"]


def held(gate, y, target):
    """A loss that waits where an interrupt leaves the last step complete."""
    if gate is not None and torch.is_grad_enabled() and nbdist.current_step() == HELD:
        gate.hold("forward")
    return nn.functional.cross_entropy(y, target)


@pytest.mark.parametrize("victim", [0, 1])
def test_no_step_is_repeated_where_a_replica_is_left(cluster, tmp_path, victim):
    """The rank that is left has saved all of it, for both."""
    found = []
    for gate in (None, Gate(tmp_path)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        run = cluster.train(model, data(), background=True, **OPTIONS | {"loss": functools.partial(held, gate)})
        if gate is not None:
            gate.wait("forward", run=run)
            os.kill(cluster.engines[victim].pid, signal.SIGKILL)
            gate.open("forward")
        run.wait()
        found.append((bits(model), rows(run)))
    assert f"all continue from step {HELD}" in str(run.progress.notes)
    assert found[0][0] == found[1][0]
    for row, expected in zip(found[1][1], found[0][1], strict=True):  # losses of a lost rank are rounded as gradients
        assert row == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-6)}


class Counting(Net):
    """Its count of forwards is extra state."""

    counts = True

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize("victims", [[], [0], [0, 1]])
def test_extra_state_comes_home_and_survives(cluster, tmp_path, victims):
    """The notebook's model has it, also of a run that lost engines; another run counts on."""
    model, pids, gate = Counting(), [engine.pid for engine in cluster.engines], Gate(tmp_path, HELD, scheduler=falling)
    run = cluster.train(model, data(), background=True, **OPTIONS | {"lr_scheduler": gate})
    gate.wait(HELD, run=run)
    for rank in victims:
        os.kill(pids[rank], signal.SIGKILL)
    gate.open(HELD)
    assert "finished" == run.wait().state
    steps = EPOCHS * SAMPLES // BATCH
    assert steps == model.calls
    cluster.train(model, data(), **OPTIONS | {"epochs": 1})
    assert steps + SAMPLES // BATCH == model.calls


def test_extra_state_after_an_error(cluster):
    """It is that of the step whose weights the model holds."""
    model = Counting((1, TRAPPED), "raise")
    with pytest.raises(EngineError, match="torn") as error:
        cluster.train(model, data(), **OPTIONS)
    held = re.search(r"The model holds the weights after step (\d+)", str(error.value))
    assert model.calls == (int(held[1]) if held else 0) < TRAPPED


def test_an_engine_that_dies_at_the_same_place_again_and_again(cluster):
    """The run fails, with an error that names the step; the engines are ready again."""
    with pytest.raises(EngineError, match=r"^rank 1: the process ended 5 times at step 1 or before: it runs out of"):
        cluster.train(net((1, 1), "die"), data(), **OPTIONS)
    assert "finished" == cluster.train(net(), data(), **OPTIONS | {"epochs": 1}).state


def test_an_engine_lost_between_runs(cluster, undisturbed):
    """The next run replaces it and notes that."""
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    until(lambda: cluster.engines[1].state == "lost")
    model = net()
    run = cluster.train(model, data(), **OPTIONS)
    assert undisturbed == (bits(model), rows(run))
    assert ["rank 1 had been lost and was replaced"] == run.progress.notes


def test_an_engine_lost_while_a_run_starts(cluster, undisturbed, monkeypatch):
    """After the lost ones were replaced, and before a world is formed: it is replaced too."""
    victims, ensure_ready = [1, 0], Engines.ensure_ready

    def lost_before(self):
        if victims:
            self.kill([victims.pop()])
        ensure_ready(self)

    monkeypatch.setattr(Engines, "ensure_ready", lost_before)
    model = net()
    run = cluster.train(model, data(), **OPTIONS)
    assert undisturbed == (bits(model), rows(run))
    assert ["ranks 0-1 had been lost and were replaced"] == run.progress.notes


def test_a_rank_whose_memory_is_gone_is_replaced(cluster, undisturbed, monkeypatch):
    """Its host's agent has been killed, and held what it writes its snapshots to; it has not ended yet itself."""
    paths_on, asked = SnapshotStore.paths_on, []

    def gone_for_the_second(self, host):
        asked.append(host)
        paths = paths_on(self, host)
        return [["/proc/self/fd/0:1.1"] * len(own) for own in paths] if len(asked) == 2 else paths

    monkeypatch.setattr(SnapshotStore, "paths_on", gone_for_the_second)
    model, before = net(), cluster.engines[1].pid
    run = cluster.train(model, data(), **OPTIONS)
    assert ("finished", undisturbed) == (run.state, (bits(model), rows(run)))
    assert "rank 1 lost (its process ended), replaced in" in run.progress.notes[0]
    assert cluster.engines[1].pid != before


def test_an_engine_lost_with_its_result(cluster, undisturbed, monkeypatch):
    """Rank 0 has gathered the weights and returned, and ends before the notebook reads them."""
    victims, open_result = [0], RunDispatch.open_result

    def lost_before(self, payload, rank):
        if victims:
            self.engines.kill([victims.pop()])
        return open_result(self, payload, rank)

    monkeypatch.setattr(RunDispatch, "open_result", lost_before)
    model = net()
    run = cluster.train(model, data(), **OPTIONS)
    assert ("finished", undisturbed) == (run.state, (bits(model), rows(run)))
    assert "rank 0 lost (its process ended), replaced in" in run.progress.notes[0]


def test_after_an_error_the_last_complete_step_is_there(cluster, undisturbed):
    """And the same call resumes from it, to the bits of a run without the error."""
    model, pids = net((1, TRAPPED), "raise"), [engine.pid for engine in cluster.engines]
    message = rf"rank 1: ValueError: torn .*\nThe model holds the weights after step {TRAPPED - 1}, "
    with pytest.raises(EngineError, match=message):
        cluster.train(model, data(), **OPTIONS)
    assert pids == [engine.pid for engine in cluster.engines]
    held = [parameter.detach().clone() for parameter in model.parameters()]
    model.trap = ()
    run = cluster.train(model, data(), resume=True, **OPTIONS)
    assert undisturbed == (bits(model), rows(run))
    expected = net()
    cluster.train(expected, data(), **OPTIONS | {"epochs": None, "steps": TRAPPED - 1})
    for (name, tensor), other in zip(expected.named_parameters(), held, strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("how", ["", "sleep", "in C"])
def test_stopped_and_resumed(cluster, undisturbed, tmp_path, how):
    """After its step, or at once in a function that hangs, even in C; then `resume` changes no bit."""
    mark, gate = tmp_path / "hangs", Gate(tmp_path, HELD, scheduler=falling)
    model = net((1, TRAPPED), how, str(mark)) if how else net()
    run = cluster.train(model, data(), background=True, **OPTIONS | {"lr_scheduler": gate})
    gate.wait(HELD, run=run)
    if how:
        gate.open(HELD)
        until(mark.exists)
    run.stop(now=bool(how))
    gate.open(HELD)
    assert "stopped" == run.wait().state
    model.trap = ()
    before = bits(model)
    if how:
        assert run.progress.step in range(1, TRAPPED)
    again = cluster.resume()
    assert bits(model) != before
    assert undisturbed[0] == bits(model)
    assert undisturbed[1] == rows(again)
    with pytest.raises(
        PlanError, match=rf"was saved after {EPOCHS} epochs: give a larger total .*--epochs {EPOCHS + 1}"
    ):
        cluster.resume()


def test_a_killed_stage_of_a_pipeline_changes_no_bit(cluster, tmp_path):
    """State that only one rank holds survives its loss too."""
    options = OPTIONS | {"strategy": "pipeline", "microbatches": 2}
    expected, model, gate = net(), net(), Gate(tmp_path, HELD, scheduler=falling)
    cluster.train(expected, data(), **options)
    run = cluster.train(model, data(), background=True, **options | {"lr_scheduler": gate})
    gate.wait(HELD, run=run)
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    gate.open(HELD)
    assert "finished" == run.wait().state
    assert bits(expected) == bits(model)
    assert run.progress.notes


def test_the_last_run_is_resumed_on_another_number_of_engines(cluster, tmp_path):
    """Its snapshot belongs to the notebook, not to the engines."""
    model, gate = net(), Gate(tmp_path, HELD, scheduler=falling)
    run = cluster.train(model, data(), background=True, **OPTIONS | {"accumulate": 1, "lr_scheduler": gate})
    gate.wait(HELD, run=run)
    run.stop()
    gate.open(HELD)
    run.wait()
    assert nbdist.last_run() is run
    step = run.progress.step
    again = cluster.train(model, data(), resume=True, strategy="tensor", **OPTIONS)
    assert (SAMPLES // BATCH * EPOCHS, "finished") == (again.progress.step, again.state)
    assert step < again.progress.step
    assert [SAMPLES] * EPOCHS == [row["samples"] for row in again.history]


def test_a_stop_at_once_that_comes_too_late_interrupts_no_rank(cluster, monkeypatch):
    """When every rank has returned, their world is intact, and collectives work in it."""
    draw = RunMonitor._draw

    def late(monitor):
        concurrent.futures.wait(monitor._calls)
        monitor._run.stop(now=True)
        draw(monitor)

    monkeypatch.setattr(RunMonitor, "_draw", late)
    run = cluster.train(net(), data(), **{**OPTIONS, "epochs": 1})
    monkeypatch.undo()
    assert run.control.abandoned
    assert run.state == "finished"
    waiting = (
        "from nbdist.engine import remote_calls; remote_calls._engine.world.store.check(['what no rank has written'])"
    )
    cluster.execute(waiting).wait()  # raises where ranks were released


class Unkept(torch.optim.SGD):
    """No snapshots are taken of it: its state holds an object."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["note"] = object()


def dying(marks, at):
    """A loss in which rank 1 dies, each time at the next step of `at`."""

    def loss(output, target):
        import os
        import signal
        from pathlib import Path

        from torch.nn import functional

        loss.steps += 1
        tries = len(list(Path(marks).iterdir()))
        if os.environ.get("RANK") == "1" and tries < len(at) and loss.steps == at[tries]:
            Path(marks, str(tries)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return functional.cross_entropy(output, target)

    loss.steps = 0
    return loss


def unkept(parameters):
    return Unkept(parameters, lr=0.1)


def test_losses_without_a_snapshot_are_forgotten_when_a_run_gets_further(cluster, tmp_path):
    """Seven losses, each at a later step: the run progressed each time, and finishes."""
    options = OPTIONS | {"loss": dying(str(tmp_path), [3, 4, 5, 6, 7, 8, 9]), "optimizer": unkept, "lr_scheduler": None}
    run = cluster.train(net(), data(), **options | {"epochs": None, "steps": 12})
    assert ("finished", 12) == (run.state, run.progress.step)
    assert 7 == len(list(tmp_path.iterdir()))


def test_on_several_hosts_losses_are_forgotten_when_a_run_gets_further(cluster, monkeypatch, tmp_path):
    """Without snapshots the ranks that were not lost report how far the run came."""
    monkeypatch.setattr(LocalHost, "here", False)
    options = OPTIONS | {"loss": dying(str(tmp_path), [3, 4, 5, 6, 7, 8, 9]), "optimizer": unkept, "lr_scheduler": None}
    options |= {"batch_size": SAMPLES, "epochs": 12}  # each step ends an epoch, so it is reported, however short
    run = cluster.train(net(), data(), **options)
    assert ("finished", 12) == (run.state, run.progress.step)
    assert 7 == len(list(tmp_path.iterdir()))


def test_a_run_without_a_snapshot_that_gets_no_further_ends(cluster, tmp_path):
    """Although it runs some steps each time."""
    options = OPTIONS | {"loss": dying(str(tmp_path), [4] * 99), "optimizer": unkept, "lr_scheduler": None}
    with pytest.raises(EngineError, match=r"^rank 1: the process ended 5 times at step 4 or before: "):
        cluster.train(net(), data(), **options)
    assert 5 == len(list(tmp_path.iterdir()))


def test_a_run_without_a_snapshot_is_scaled_up_and_down_again(cluster, tmp_path, monkeypatch):
    """It restarts twice, from its first step, and ends on the last requested number of engines."""
    sizes, start = [], RunDispatch.start

    def counted(dispatch, **how):
        sizes.append(dispatch.engines.size)
        return start(dispatch, **how)

    monkeypatch.setattr(RunDispatch, "start", counted)
    gate = Gate(tmp_path, 3, 6)
    options = OPTIONS | {"optimizer": unkept, "lr_scheduler": gate, "epochs": None, "steps": 9}
    run = cluster.train(net(), data(), background=True, **options)
    try:
        gate.wait(3, run=run)
        cluster.scale(3)
        gate.open(3)
        gate.wait(6, ranks=3, run=run)
        cluster.scale(2)
        gate.open(6)
        until(lambda: run.ended or len(sizes) > 3)
        assert ([2, 3, 2], "finished", 9) == (sizes, run.state, run.progress.step)
    finally:
        gate.open()
        if not run.ended:
            run.stop(now=True)
        run.wait()
        if cluster.size != 2:
            cluster.scale(2)
    commands = [happening.text for happening in run.progress.happenings if happening.kind == "command"]
    assert ["scaled to 3 after step 4", "scaled to 2 after step 7"] == commands
