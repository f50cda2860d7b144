"""Values that a step carries from batch to batch: as a plain loop of one process carries them."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from problems import assert_same_bits, seeded, train_task
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError
from nbdist.plan.train_options import TRAIN_OPTIONS

BATCHES, STREAMS, LENGTH, WIDTH, EPOCHS = 4, 6, 3, 4, 2
SGD = functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Recurrent(nn.Module):
    """Reads a piece of each stream, and goes on from where the piece before has ended."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(WIDTH + 8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, WIDTH)

    def forward(self, x, hidden=None):
        h, c = hidden or (x.new_zeros(len(x), 8), x.new_zeros(len(x), 8))
        out = []
        for piece in x.unbind(1):
            h = torch.tanh(self.cell(torch.cat([piece, h], 1)))
            c = 0.5 * c + h
            out.append(self.head(c))
        return torch.stack(out, 1), (h, c)


def recurrent():
    return seeded(Recurrent, torch.float64)


def streams(batches=BATCHES, seed=1):
    """Batches that continue each other: sample ``i`` of each is the next piece of stream ``i``."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(STREAMS, batches * LENGTH + 1, WIDTH, generator=generator, dtype=torch.float64)
    x, y = (torch.cat(whole[:, i : i + batches * LENGTH].split(LENGTH, 1)) for i in (0, 1))
    return x, y


def loss_of(model, batch, hidden):
    out, hidden = model(batch[0], hidden)
    return F.mse_loss(out, batch[1]), tuple(one.detach() for one in hidden)


def step(model, batch):
    state = nbdist.carried(hidden=None)
    loss, state.hidden = loss_of(model, batch, state.hidden)
    return loss


def stays(model, batch):
    state = nbdist.carried(over_epochs=True, hidden=None)
    loss, state.hidden = loss_of(model, batch, state.hidden)
    return loss


@torch.no_grad()
def evaluated(model, data):
    losses, hidden = [], None
    for x, y in zip(*(part.split(STREAMS) for part in data), strict=True):
        loss, hidden = loss_of(model, (x, y), hidden)
        losses.append(loss.item())
    return sum(losses) / len(losses)


def plain(*, over_epochs=False, every=STREAMS):
    """The loop of one process; its weights, and its validation losses."""
    model, hidden, val = recurrent(), None, []
    optimizer = SGD(model.parameters())
    for _ in range(EPOCHS):
        hidden = hidden if over_epochs else None
        for x, y in zip(*(part.split(every) for part in streams()), strict=True):
            optimizer.zero_grad()
            loss, hidden = loss_of(model, (x, y), hidden)
            loss.backward()
            optimizer.step()
        val.append(evaluated(model, streams(seed=2)))
    return model.state_dict(), val


def run(world, step, options, model=None):
    model, data = model or recurrent(), options.pop("data", streams())
    options = {"optimizer": SGD, "batch_size": STREAMS, "shuffle": False, "epochs": EPOCHS, **options}
    of_task = {name: options.pop(name) for name in tuple(options) if TRAIN_OPTIONS[name].of_task}
    task = Task.create(model, data, step=step, **of_task)
    return train_task(world, task, **options), model.state_dict()


@pytest.fixture
def run_on(run_ranks):
    """Runs steps on a mesh; returns each rank's result and weights."""

    def on(mesh, step, **options):
        size = math.prod(int(degree) for degree in re.findall(r"\d+", mesh))
        return run_ranks(size, run, step, {"strategy": mesh, **options})

    return on


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2", "dp=3", "shard=2", "tp=2", "dp=2,shard=2"])
def test_each_slice_goes_on_from_its_own_values(run_on, mesh):
    """Weights, and the loss of evaluations, which begin anew and leave nothing."""
    weights, val = plain()
    for result, trained in run_on(mesh, step, val=streams(seed=2)):
        torch.testing.assert_close(trained, weights, **CLOSE)
        assert [row["val_loss"] for row in result.history] == pytest.approx(val, rel=1e-10)


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"accumulate": 2, "reproducible": 0}, {"reproducible": 6}])
def test_a_rank_carries_the_values_of_each_of_its_slices(run_on, options):
    """Several slices a rank, one after another."""
    for _, trained in run_on("dp=2" if "reproducible" not in options else "dp=1", step, **options):
        torch.testing.assert_close(trained, plain()[0], **CLOSE)


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2", "shard=2"])
def test_values_may_stay_from_epoch_to_epoch(run_on, mesh):
    """If the step says so."""
    weights, _ = plain(over_epochs=True)
    assert not torch.equal(weights["head.bias"], plain()[0]["head.bias"])
    for _, trained in run_on(mesh, stays):
        torch.testing.assert_close(trained, weights, **CLOSE)


def test_reproducible_runs_carry_the_same_bits_on_any_number_of_ranks(run_on):
    """One environment a slice, as it were."""
    (_, expected), *_ = run_on("dp=1", step, reproducible=3)
    for mesh in ("dp=2", "dp=3"):
        for _, trained in run_on(mesh, step, reproducible=3):
            torch.testing.assert_close(trained, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2"])
def test_a_resumed_run_goes_on_with_what_was_carried(run_on, tmp_path, mesh):
    """From the middle of an epoch: the same bits."""
    folder = str(tmp_path)
    (_, expected), *_ = run_on(mesh, stays, steps=7, epochs=None)
    run_on(mesh, stays, steps=3, epochs=None, checkpoint=folder)
    for _, trained in run_on(mesh, stays, steps=7, epochs=None, resume=folder):
        torch.testing.assert_close(trained, expected, rtol=0, atol=0)


def test_it_is_resumed_on_another_number_of_ranks_if_slices_are_the_same(run_on, tmp_path):
    """Else one sentence says what was carried."""
    folder = str(tmp_path)
    (_, expected), *_ = run_on("dp=1", step, steps=7, epochs=None, reproducible=3)
    run_on("dp=3", step, steps=3, epochs=None, reproducible=3, checkpoint=folder)
    for _, trained in run_on("dp=2", step, steps=7, epochs=None, reproducible=3, resume=folder):
        torch.testing.assert_close(trained, expected, rtol=0, atol=0)
    with pytest.raises(PlanError, match=r"hidden of 3 slices.*have 2: use as many ranks as before, or begin with"):
        run_on("dp=2", step, steps=7, epochs=None, resume=folder)


def test_a_closure_that_computes_a_loss_again_begins_with_the_same_values(run_on):
    """LBFGS: each call within a step goes on from the batch before."""
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.3, max_iter=3)
    model, hidden = recurrent(), None
    optimizer = lbfgs(model.parameters())
    for x, y in zip(*(part.split(STREAMS) for part in streams()), strict=True):
        after = []

        def closure(x=x, y=y, hidden=hidden, after=after):
            optimizer.zero_grad()
            loss, last = loss_of(model, (x, y), hidden)
            after.append(last)
            loss.backward()
            return loss

        optimizer.step(closure)
        hidden = after[-1]
    for _, trained in run_on("dp=2", step, optimizer=lbfgs, epochs=1):
        torch.testing.assert_close(trained, model.state_dict(), rtol=1e-8, atol=1e-10)


def updates(model, batch):
    state = nbdist.carried(hidden=None)
    loss, state.hidden = loss_of(model, batch, state.hidden)
    nbdist.update(loss)


def test_steps_that_update_carry_too(run_on):
    """The same weights as with a loss that is returned."""
    for _, trained in run_on("dp=2", updates):
        torch.testing.assert_close(trained, plain()[0], **CLOSE)


def everything(model, batch):
    state = nbdist.carried(over_epochs=True, count=0, seen=(), rng=None, row={})
    generator = torch.Generator()
    if state.rng is None:
        generator.manual_seed(3)
    else:
        generator.set_state(state.rng)
    drawn = torch.rand(2, generator=generator, dtype=torch.float64)
    state.rng, state.count, state.seen = generator.get_state(), state.count + 1, (*state.seen, drawn)
    state.row["bytes"] = b"x" * state.count
    assert len(state.seen) == state.count == len(state.row["bytes"])
    loss, _ = loss_of(model, batch, None)
    return loss * (1 + state.seen[0].sum() * state.count), None, {"count": state.count}


def test_numbers_generators_and_containers_are_carried(run_on, tmp_path):
    """Through a checkpoint, as they were."""
    folder = str(tmp_path)
    (whole, expected), *_ = run_on("dp=2", everything, steps=5, epochs=None)
    assert 3.0 == whole.history[-1]["count"]
    run_on("dp=2", everything, steps=2, epochs=None, checkpoint=folder)
    for _, trained in run_on("dp=2", everything, steps=5, epochs=None, resume=folder):
        torch.testing.assert_close(trained, expected, rtol=0, atol=0)


def graph(model, batch):
    state = nbdist.carried(hidden=None)
    out, state.hidden = model(batch[0], state.hidden)
    return F.mse_loss(out, batch[1])


def unsaved(model, batch):
    nbdist.carried(thing=None).thing = torch.Generator()
    return step(model, batch)


def misspelt(model, batch):
    nbdist.carried(hidden=None).hiden = 1
    return step(model, batch)


def through_a_method(model, batch):
    return Hidden().step(model, batch)


class Hidden:
    """Calls what is to be found in the step's own code."""

    def step(self, model, batch):
        return step(model, batch)


@pytest.mark.parametrize(
    ("step", "options", "error", "words"),
    [
        (graph, {}, TaskError, r"carries as hidden still has its graph.*detach\(\)"),
        (unsaved, {}, TaskError, r"carries as thing is a Generator, which cannot be saved: keep what it is made of"),
        (misspelt, {}, TaskError, r"carries hidden, not hiden. Did you mean .hidden"),
        (through_a_method, {"check": "no"}, TaskError, r"nbdist\.carried is called where nbdist did not find it"),
        (step, {"batch_size": 9, "check": "no"}, TaskError, r"a slice of 6 samples follows one of 9, of which hidden"),
        (step, {"shuffle": None}, PlanError, r"shuffled unless you say otherwise: give shuffle=False"),
        (step, {"strategy": "pp=2", "batch_size": 4}, PlanError, r"carries values.*no rank that runs the whole step"),
    ],
)
def test_mistakes_get_one_sentence(run_on, step, options, error, words):
    """Before an engine is touched, or in the first steps."""
    with pytest.raises(error, match=words):
        run_on(options.pop("strategy", "dp=1"), step, **options)


def whole_batch(model, batch):
    """Fails by itself where a batch is smaller than what was carried."""
    state = nbdist.carried(last=None)
    before = batch[0] if state.last is None else state.last.view(batch[0].shape)
    state.last = before.detach().flatten()
    return F.mse_loss(model(batch[0])[0], batch[1])


def refused(world, step, options):
    model = recurrent()
    with pytest.raises(TaskError) as error:
        run(world, step, options, model)
    assert_same_bits(model.state_dict(), recurrent().state_dict())
    return str(error.value)


@pytest.mark.parametrize(
    ("step", "options", "words"),
    [
        (step, {"batch_size": 9}, r"a slice of \d samples follows one of \d, of which hidden is carried"),
        (step, {"batch_size": 10, "accumulate": 2}, r"a slice of \d samples follows one of \d, of which hidden"),
        (step, {"val": tuple(part[:-2] for part in streams())}, r"a slice of \d samples follows one of \d, of which"),
        (whole_batch, {"batch_size": 9}, r"gives the step \d samples where.*fails on them .RuntimeError: shape"),
    ],
)
def test_a_smaller_last_batch_is_refused_before_the_first_update(run_ranks, step, options, words):
    """Where what is carried has a row for each sample."""
    for ranks in (1, 2):
        for error in run_ranks(ranks, refused, step, {"strategy": f"dp={ranks}", **options}):
            assert re.search(words, error)


def test_a_smaller_last_batch_is_no_fault_where_nothing_is_of_a_sample(run_on):
    """Nor where the run ends before it."""
    run_on("dp=2", everything, batch_size=9)
    run_on("dp=2", step, batch_size=9, steps=2, epochs=None)


class Walk:
    """An environment: a place on a line, and a goal; a generator moves the goal."""

    def __init__(self, state):
        self.place, self.goal, drawn = state or (torch.zeros(2, dtype=torch.float64), torch.ones(2), None)
        self.generator = torch.Generator()
        if drawn is not None:
            self.generator.set_state(drawn)

    def step(self, action):
        self.place = self.place + (action - 0.5)
        reward = -(self.place - self.goal).abs()
        self.goal = self.goal + 0.1 * torch.randn(2, generator=self.generator)
        return self.place.clone(), reward

    @property
    def state(self):
        return self.place, self.goal, self.generator.get_state()


def play(model, batch):
    """REINFORCE on an environment that is played on from batch to batch, one in each slice."""
    state = nbdist.carried(over_epochs=True, env=None)
    env, logs, rewards = Walk(state.env), [], []
    for _ in range(3):
        scores = model(torch.stack([env.place, env.goal.double()], 1))
        action = torch.bernoulli(torch.sigmoid(scores[:, 0])).detach()
        logs.append(-F.binary_cross_entropy_with_logits(scores[:, 0], action, reduction="none"))
        rewards.append(env.step(action)[1])
    state.env = env.state
    return -(torch.stack(logs) * torch.stack(rewards)).mean(), None, {"reward": torch.stack(rewards).mean()}


def played(world, options):
    model = seeded(functools.partial(nn.Linear, 2, 1), torch.float64)
    task = Task.create(model, (torch.arange(12.0),), step=play, batch_size=4, shuffle=True, optimizer=SGD)
    result = train_task(world, task, reproducible=4, check="mesh", **options)
    return [row["reward"] for row in result.history], model.state_dict()


def test_environments_are_played_on_the_same_on_any_number_of_ranks(run_ranks, tmp_path):
    """Rewards and weights, bit for bit; and after a resume in the midst of it."""
    ((rewards, expected),) = run_ranks(1, played, {"epochs": 4})
    assert 4 == len(set(rewards))
    for ranks in (2, 4):
        for _, trained in run_ranks(ranks, played, {"epochs": 4}):
            torch.testing.assert_close(trained, expected, rtol=0, atol=0)
    run_ranks(4, played, {"epochs": 2, "checkpoint": str(tmp_path)})
    for again, trained in run_ranks(2, played, {"epochs": 4, "resume": str(tmp_path)}):
        torch.testing.assert_close(trained, expected, rtol=0, atol=0)
        assert rewards == again


def test_outside_of_a_run_it_gives_the_first_values():
    """So that a step can be tried by itself."""
    assert step(recurrent(), tuple(part[:STREAMS] for part in streams())).requires_grad


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2"])
def test_validation_data_have_batches_of_their_loader(run_on, mesh):
    """Of another size than those of the training data, as in a plain loop."""
    val = streams(batches=5, seed=2)
    few = tuple(part.view(5, STREAMS, *part.shape[1:])[:, :4].flatten(0, 1) for part in val)
    losses, hidden = [], None
    with torch.no_grad():
        for x, y in zip(*(part.split(4) for part in few), strict=True):
            loss, hidden = loss_of(recurrent(), (x, y), hidden)
            losses.append(loss.item())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*few), 4)
    for result, _ in run_on(mesh, step, val=loader, lr=1e-30, optimizer="sgd", epochs=1):
        assert result.history[0]["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_a_loader_that_drops_the_last_batch_drops_that_of_the_validation_data_too(run_on):
    """A shorter one would not go on where the one before has ended."""
    data = torch.utils.data.TensorDataset(*(part[: 3 * STREAMS + 2] for part in streams(seed=2)))
    loader = torch.utils.data.DataLoader(data, STREAMS, drop_last=True)
    expected = evaluated(recurrent(), tuple(part[: 3 * STREAMS] for part in streams(seed=2)))
    (result, _), *_ = run_on(
        "dp=1",
        step,
        val=loader,
        lr=1e-30,
        optimizer="sgd",
        epochs=1,
        batch_size=None,
        data=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*streams()), STREAMS),
    )
    assert result.history[0]["val_loss"] == pytest.approx(expected, rel=1e-10)
