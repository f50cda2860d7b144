"""Training through a cluster: the numbers, the user's own objects, stopping, and every way to fail."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from gate import main_thread_is_in
from shared_cluster import ENGINES, until
from tasks import CLASSES, FEATURES, classes, copied, net, rows, same
from torch import nn
from torch.utils.data import DataLoader

import nbdist
from nbdist.cluster import Run, attend
from nbdist.errors import ClusterError, EngineError, PlanError, TaskError

EXACT = {"rtol": 1e-12, "atol": 1e-12}
ENDLESS = 10**9


def begin(cluster, model, **options):
    """Start a run that never ends by itself, and return it once it runs."""
    given = {"loss": "cross_entropy", "steps": ENDLESS, "batch_size": 16, **options}
    run = cluster.train(model, given.pop("data", classes()), background=True, **given)
    until(lambda: run.progress.step > 3)
    return run


def test_two_engines_train_as_one_process_does(cluster):
    """Weights, buffers and history are those of one process that runs the same slices, to rounding."""
    options = {"loss": "cross_entropy", "epochs": 2, "batch_size": 24, "lr": 0.01, "seed": 3, "clip_norm": 0.5}
    data, val = classes(65, torch.float64), classes(33, torch.float64)
    model, alone = net(torch.float64), net(torch.float64)
    for linear_only in (model, alone):
        linear_only[1] = nn.Identity()  # over ranks BatchNorm has other statistics, which is not tested here
    run = cluster.train(model, data, val=val, metric="accuracy", accumulate=2, **options)
    result = nbdist.train(alone, data, val=val, metric="accuracy", accumulate=2 * ENGINES, verbose=False, **options)
    torch.testing.assert_close(copied(model), copied(alone), **EXACT)
    keys = ["epoch", "steps", "samples", "loss", "seconds", "val_loss", "val_accuracy"]
    assert [list(row) for row in run.history] == [keys, keys]
    for row, expected in zip(run.history, result.history, strict=True):
        del row["seconds"], expected["seconds"]
        torch.testing.assert_close(row, expected, **EXACT)


def test_a_run_tells_what_was_run(cluster):
    """State, plan, the one history row with steps, the same step on all ranks; and it is `last_run`."""
    run = cluster.train(net(), classes(), loss="cross_entropy", optimizer="sgd", steps=5, batch_size=16, seed=4)
    assert run.state == "finished"
    assert nbdist.last_run() is run
    assert run.wait() is run
    assert [(row["epoch"], row["steps"], row["samples"]) for row in run.history] == [(1, 5, 5 * 16)]
    plan = run.plan
    assert (str(plan.mesh), plan.optimizer, plan.steps, plan.epochs, plan.batch_size, plan.seed) == (
        "dp=2", "sgd", 5, None, 16, 4,
    )  # fmt: skip
    assert [rank.step for rank in run.progress.ranks.values()] == [5] * ENGINES
    assert run.progress.samples == 5 * 16
    assert "finished" in repr(run)
    assert "step 5/5" in repr(run)


def test_weights_change_in_place_at_the_end_and_not_before(cluster):
    """During a background run the model is unchanged; after the stop its own tensors hold the trained values."""
    model = net()
    before, tensors = copied(model), [*model.parameters(), *model.buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    run = begin(cluster, model)
    assert run.state == "running"
    assert {engine.state for engine in cluster.engines} == {"busy"}
    assert run.wait(0.01) is run
    for refused in (lambda: cluster.train(net(), classes(), loss="cross_entropy"), lambda: cluster.push(x=1)):
        with pytest.raises(ClusterError, match=rf"run {run.run_id} is running: wait for it .* or stop it"):
            refused()
    assert same(model, before)

    run.stop()
    run.stop()
    assert run.wait().state == "stopped"
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert [tensor.data_ptr() for tensor in after] == places
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    steps = {rank.step for rank in run.progress.ranks.values()}
    assert steps == {run.history[-1]["steps"]}, "all ranks stopped after the same step"


def test_the_users_own_optimizer_gets_its_state_back(cluster):
    """Two runs with one optimizer are one process's two runs: its moments are loaded, for the model's parameters."""
    results = []
    for train, slices in ((cluster.train, 1), (nbdist.train, ENGINES)):
        model = net(torch.float64)
        model[1] = nn.Identity()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        quiet = {} if train == cluster.train else {"verbose": False}
        for seed in (1, 2):
            train(model, classes(64, torch.float64), loss="cross_entropy", optimizer=optimizer, accumulate=slices,
                  seed=seed, **quiet)  # fmt: skip
        assert [state["step"].item() for state in optimizer.state.values()] == [4.0] * 4
        assert set(optimizer.state) == set(model.parameters())
        results.append((copied(model), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*results, **EXACT)


class Counting(torch.optim.SGD):
    """It lowers its rate by an attribute of its own."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        self.param_groups[0]["lr"] = 0.1 / self.calls
        return super().step(closure)


class Scaled(nn.Module):
    """Its input is scaled by an `nn.Buffer`, and the gradient of half of its weights is masked by a hook."""

    def __init__(self, dtype):
        super().__init__()
        self.scale, self.line = nn.Buffer(torch.full((6,), 2.0, dtype=dtype)), nn.Linear(6, 3, dtype=dtype)
        self.line.weight.register_hook(lambda gradient: gradient * (torch.arange(6) < 3))

    def forward(self, x):
        return self.line(self.scale * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_torch_does_not_pickle_takes_part(cluster, dtype):
    """A buffer, a hook and an optimizer's own attributes, there and back: as in one process."""
    results = []
    for train, slices in ((cluster.train, 1), (nbdist.train, ENGINES)):
        torch.manual_seed(0)
        model = Scaled(dtype)
        optimizer = Counting(model.parameters())
        quiet = {} if train == cluster.train else {"verbose": False}
        train(model, classes(64, dtype), loss="cross_entropy", optimizer=optimizer, accumulate=slices, **quiet)
        results.append((copied(model), optimizer.calls, optimizer.param_groups[0]["lr"]))
    assert (2, 0.05) == results[0][1:]
    torch.testing.assert_close(*results, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_an_interrupt_in_the_foreground_stops_the_run_after_a_step(cluster):
    """As ■ does: all ranks end after the same step, the weights are loaded, then KeyboardInterrupt."""
    model = net()
    before = copied(model)
    pending = iter([True])

    def interrupt_once_it_runs(run):
        if run.progress.step > 3 and next(pending, False):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        cluster.train(model, classes(), loss="cross_entropy", steps=ENDLESS, watch=interrupt_once_it_runs)
    run = nbdist.last_run()
    assert (run.state, run.ended) == ("stopped", True)
    assert len({rank.step for rank in run.progress.ranks.values()}) == 1
    assert not same(model, before)


def test_an_interrupt_while_a_background_run_is_waited_for_leaves_it_alone(cluster):
    """It says how to end the run instead."""
    pending = iter([True])

    def interrupt_once(run):
        if main_thread_is_in(Run.wait) and next(pending, False):
            os.kill(os.getpid(), signal.SIGINT)

    run = cluster.train(net(), classes(), loss="cross_entropy", steps=ENDLESS, background=True, watch=interrupt_once)
    message = rf"run {run.run_id} continues: run.stop\(\) ends it, or %dist_run stop."
    with pytest.raises(KeyboardInterrupt, match=message):
        run.wait()
    assert run.state == "running"
    run.stop()
    assert run.wait().state == "stopped"


def test_a_second_interrupt_ends_a_step_that_hangs(cluster):
    """The first one waits for the step; after the second the engines are idle, the model unchanged."""

    def endless(output, target):
        while True:
            pass

    model = net()
    before = copied(model)
    started = cluster.train(model, classes(), loss=endless, background=True, check="no")
    until(lambda: started.progress.state == "running")
    presses = iter([True, True])

    def press():
        if next(presses, False):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        attend(started, press)
    assert (started.state, started.ended) == ("stopped", True)
    assert same(model, before)
    assert cluster.train(model, classes(), loss="cross_entropy").state == "finished"


def test_a_rank_that_does_not_notice_a_failure_is_interrupted(cluster):
    """One rank fails while the other is in an endless loop of user code: the run ends, with the cause."""

    def one_fails(output, target):
        while os.environ["RANK"] == "0":
            pass
        raise ValueError("torn")

    with pytest.raises(EngineError, match=r"^rank 1: ValueError: torn \(.*test_dispatch.py, line \d+\)"):
        cluster.train(net(), classes(), loss=one_fails)
    assert cluster.train(net(), classes(), loss="cross_entropy").state == "finished"


def test_what_watches_a_run_cannot_break_it(cluster):
    """An exception in `watch` does not end the run."""

    def broken(run):
        raise RuntimeError("no canvas")

    with pytest.warns(UserWarning, match="no canvas"):
        run = cluster.train(net(), classes(), loss="cross_entropy", watch=broken)
    assert run.state == "finished"


def test_stopping_the_engines_ends_a_run(cluster):
    """`wait` does not wait for lost ranks; the newest snapshot is loaded."""
    model = net()
    before = copied(model)
    run = begin(cluster, model)
    cluster.stop()
    with pytest.raises(ClusterError, match="the engines were stopped during the run"):
        run.wait()
    assert run.state == "failed"
    assert not same(model, before)


BAD = [
    ({"strategy": "dataa"}, PlanError, "unknown strategy 'dataa': use data, .*Did you mean 'data'"),
    ({"strategy": "dp=3"}, PlanError, "'dp=3' needs 3 ranks, but there are 2: use dp=2, or start 3 engines"),
    ({"batch_size": 1}, PlanError, "batch_size 1 is smaller than its 2 slices .*: use 2 or more"),
    ({"batch_size": "many"}, PlanError, "batch_size must be a whole number, not 'many'"),
    ({"epochs": 0}, PlanError, "epochs 0 is too small: use 1 or more"),
    ({"epochs": 1, "steps": 1}, PlanError, "give one of the two"),
    ({"lr": -1}, PlanError, "lr -1 must be a positive number"),
    ({"lerning_rate": 1}, PlanError, "unknown option 'lerning_rate'"),
    ({"loss": None}, TaskError, "no loss: name one"),
    ({"loss": 3}, TaskError, "loss must be a name or a callable, not 3"),
    ({"loss": "crossentropy"}, TaskError, "unknown loss 'crossentropy': .*Did you mean 'cross_entropy'"),
    ({"optimizer": "adamm"}, TaskError, "unknown optimizer 'adamm': .*Did you mean 'adam"),
    ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TaskError, "1 parameters that are not the model's"),
    ({"metric": "accuracy"}, TaskError, "metric accuracy has no data to be measured on: give val"),
    ({"data": None}, TaskError, "data is None, not data: give a Dataset"),
    ({"data": 5}, TaskError, "data is a value of type int, not data"),
    ({"data": (torch.zeros(0, FEATURES), torch.zeros(0))}, TaskError, "data is empty"),
    ({"data": (torch.zeros(3, FEATURES), torch.zeros(2))}, TaskError, r"differ in their number of samples, \[3, 2\]"),
    ({"model": nn.ReLU()}, TaskError, "model has no parameters to train"),
    ({"model": nn.Linear}, TaskError, r"model is a class, not a model: write Linear\(\)"),
    ({"model": {}}, TaskError, "model is a value of type dict, not a torch.nn.Module"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD, ids=[str(next(iter(case[0].items())))[:40] for case in BAD])
def test_bad_input_is_refused_before_an_engine_is_touched(cluster, untouched, wrong, kind, message):
    """One error that names the value and what to use; no run, record or new world is created."""
    given = {"model": net(), "data": classes(), "loss": "cross_entropy", **wrong}
    with pytest.raises(kind, match=message):
        cluster.train(given.pop("model"), given.pop("data"), **given)


def test_what_cannot_be_sent_is_refused_by_name(cluster, untouched, tmp_path):
    """A model that holds an open file cannot be pickled, and nothing replaces the file."""
    model = net()
    with (tmp_path / "log").open("w") as model.log, pytest.raises(TaskError, match=r"^model\.log is an open file"):
        cluster.train(model, classes(), loss="cross_entropy")


def assert_freed(records, run):
    """By the ranks' own records, both ended the run."""
    files = sorted((records / run.run_id).glob("rank*.jsonl"))
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {0, 1} == {event["rank"] for event in events if event["event"] == "RunFailed"}


def test_an_error_on_one_rank_is_shown_with_its_place_and_ends_the_other(cluster, records):
    """Rank, place and source line are named, and the engines train again in a new world."""
    model = net()
    before, pids = copied(model), [engine.pid for engine in cluster.engines]
    expected = r"(?m)^rank 1: ValueError: sample 50 is torn \(.*tasks.py, line \d+\)$"
    with pytest.raises(EngineError, match=expected) as raised:
        cluster.train(model, rows(fail_at=50), loss="cross_entropy", batch_size=32, shuffle=False)
    assert raised.value.rank == 1
    assert 'raise ValueError(f"sample {index} is torn")' in raised.value.remote_traceback
    run = nbdist.last_run()
    assert run.state == "failed"
    assert run.error is raised.value
    with pytest.raises(EngineError):
        run.wait()
    assert_freed(records, run)
    assert not same(model, before)  # it holds the newest snapshot
    assert cluster.train(model, rows(), loss="cross_entropy").state == "finished"
    assert [engine.pid for engine in cluster.engines] == pids


def test_data_loader_workers_read_inside_the_engines(cluster):
    """The loader's own workers and batch size are used, and gone afterwards."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.ones(FEATURES), int(torch.utils.data.get_worker_info() is not None)

    def loss(output, target):
        assert target.all(), "read without a worker"
        return nn.functional.cross_entropy(output, target % CLASSES)

    run = cluster.train(net(), DataLoader(Rows(), batch_size=16, num_workers=1), loss=loss, epochs=2)
    assert [row["steps"] for row in run.history] == [2, 2]
    assert run.plan.batch_size == 16
    assert run.plan.shuffle is False
