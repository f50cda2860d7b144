"""Steps that update several optimizers, one after another: as a plain loop of one process."""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
from problems import classes, seeded, train_task
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.strategies import choice
from nbdist.core.task import own_loop
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.plan.train_options import TRAIN_OPTIONS

ADAM = functools.partial(torch.optim.Adam, lr=0.02)
SAMPLES, BATCH, NOISE = 22, 8, 3  # the last batch is a short one
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def adversaries():
    """A critic and a generator, which share nothing."""
    return {
        "d": seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.float64),
        "g": seeded(lambda: nn.Sequential(nn.Linear(NOISE, 8), nn.Tanh(), nn.Linear(8, 6)), torch.float64),
    }


def bce(logits, target):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def losses_of(model, batch, update):
    """A step of a GAN, with a critic that is trained twice; the noise is a part of the data."""
    real, noise = batch[0], batch[0][:, :NOISE] ** 2
    fake = model["g"](noise)
    for scale in (1.0, 0.5):
        update(bce(model["d"](real), 1.0) + bce(model["d"](scale * fake.detach()), 0.0), "d")
    update(bce(model["d"](fake), 1.0), "g")


def gan(model, batch):
    losses_of(model, batch, nbdist.update)


class PlainLoop:
    """The same step in plain PyTorch."""

    def __init__(self, modules, make=ADAM, clip=None):
        self.modules, self.clip = modules, clip
        self.optimizers = {name: make(module.parameters()) for name, module in modules.items()}
        self.losses = []

    def update(self, loss, name, *, retain_graph=False, weight=None):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward(retain_graph=retain_graph)
        names = (name,) if isinstance(name, str) else name
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for one in names for p in self.modules[one].parameters()], self.clip)
        for one in names:
            self.optimizers[one].step()
        self.losses.append((name, loss.item(), self.samples))

    def epoch(self, data, losses_of):
        """Run one; returns the mean loss of each optimizer."""
        self.losses.clear()
        for rows in torch.arange(len(data[0])).split(BATCH):
            self.samples = len(rows)
            losses_of(self.modules, tuple(part[rows] for part in data), self.update)
        of = {name: [(loss, n) for other, loss, n in self.losses if other == name] for name in self.modules}
        return {
            f"loss_{name}": sum(a * n for a, n in pairs) / sum(n for _, n in pairs)
            for name, pairs in of.items()
            if pairs
        }


def plain(losses_of=losses_of, **settings):
    loop = PlainLoop(adversaries(), **settings)
    rows = [loop.epoch(classes(SAMPLES), losses_of) for _ in range(2)]
    return weights_of(loop.modules), rows


def weights_of(modules):
    return {f"{name}.{key}": t.detach() for name, module in modules.items() for key, t in module.state_dict().items()}


@pytest.fixture
def run_on(run_ranks):
    """Runs a function on a mesh."""

    def run(mesh, function, step, options):
        size = math.prod(int(degree) for degree in re.findall(r"\d+", mesh))
        return run_ranks(size, function, step, {"strategy": mesh, **options})

    return run


def run(world, step, options):
    """Train both; returns the result and the weights."""
    modules = adversaries()
    options = {"optimizer": {"d": ADAM, "g": ADAM}, "batch_size": BATCH, "shuffle": False, "epochs": 2, **options}
    of_task = {name: options.pop(name) for name in tuple(options) if TRAIN_OPTIONS[name].of_task}
    task = Task.create(modules, classes(SAMPLES), step=step, **of_task)
    return train_task(world, task, **options), weights_of(modules)


MESHES = pytest.mark.parametrize("mesh", ["dp=1", "dp=2", "shard=2"])
ALL_MESHES = pytest.mark.parametrize("mesh", ["dp=1", "dp=2", "dp=3", "shard=2", "shard=3", "dp=2,shard=2"])


@ALL_MESHES
def test_a_gan_is_trained_as_in_one_process(run_on, mesh):
    """Weights and each loss, on batches of which some are short."""
    weights, rows = plain()
    for result, trained in run_on(mesh, run, gan, {}):
        for name, expected in weights.items():
            torch.testing.assert_close(trained[name], expected, **CLOSE)
        for row, expected in zip(result.history, rows, strict=True):
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-10)


@MESHES
def test_each_update_is_clipped_by_itself(run_on, mesh):
    """By the norm of one optimizer's gradients."""
    weights, _ = plain(clip=0.1)
    assert not torch.allclose(weights["d.0.weight"], plain()[0]["d.0.weight"], rtol=1e-3)
    for _, trained in run_on(mesh, run, gan, {"clip_norm": 0.1}):
        torch.testing.assert_close(trained, weights, **CLOSE)


def attached(model, batch, update):
    """Both losses go through the generator, which the critic's update leaves alone."""
    fake = model["g"](batch[0][:, :NOISE] ** 2)
    update(bce(model["d"](batch[0]), 1.0) + bce(model["d"](fake), 0.0), "d", retain_graph=True)
    update(bce(model["d"](fake), 1.0), "g")


def penalized(model, batch, update):
    """As WGAN-GP: the critic's loss holds a gradient."""
    real, fake = batch[0], model["g"](batch[0][:, :NOISE])
    between = (0.5 * (real + fake.detach())).requires_grad_()
    (slope,) = torch.autograd.grad(model["d"](between).sum(), between, create_graph=True)
    update(model["d"](fake.detach()).mean() - model["d"](real).mean() + (slope.norm(dim=1) - 1).square().mean(), "d")
    update(-model["d"](fake).mean(), "g")


def step_of(losses_of, model, batch):
    """An ordinary function names what updates; a partial hands it over."""
    losses_of(model, batch, nbdist.update)


@MESHES
@pytest.mark.parametrize("losses_of", [attached, penalized])
def test_graphs_of_other_shapes(run_on, mesh, losses_of):
    """Graphs that two losses share, and gradients within a loss."""
    weights, rows = plain(losses_of)
    for result, trained in run_on(mesh, run, functools.partial(step_of, losses_of), {}):
        torch.testing.assert_close(trained, weights, **CLOSE)
        assert {name: result.history[-1][name] for name in rows[-1]} == pytest.approx(rows[-1], rel=1e-10)


def alternating(model, batch, update, step):
    """The generator is trained in every second step only."""
    fake = model["g"](batch[0][:, :NOISE])
    update(bce(model["d"](batch[0]), 1.0) + bce(model["d"](fake.detach()), 0.0), "d")
    if step % 2:
        update(bce(model["d"](fake), 1.0), "g")


def alternating_step(model, batch):
    alternating(model, batch, nbdist.update, nbdist.current_step())


@MESHES
def test_an_optimizer_at_another_interval(run_on, mesh):
    """Moments and weight decay of the other one stand still meanwhile; the number of the step is known."""
    steps = itertools.count()
    weights, _ = plain(lambda *args: alternating(*args, next(steps)))
    for _, trained in run_on(mesh, run, alternating_step, {}):
        torch.testing.assert_close(trained, weights, **CLOSE)
    assert nbdist.current_step() == 0


def information(model, batch, update):
    """As InfoGAN: a loss by which both step."""
    fake = model["g"](batch[0][:, :NOISE])
    update(bce(model["d"](batch[0]), 1.0) + bce(model["d"](fake.detach()), 0.0), "d")
    update((model["d"](model["g"](batch[0][:, :NOISE])) - batch[0].mean(1, keepdim=True)).square().mean(), ("g", "d"))


@MESHES
def test_several_optimizers_by_one_loss(run_on, mesh):
    """Each once, with the gradients of the same weights; clipped together."""
    weights, _ = plain(information, clip=0.2)
    for result, trained in run_on(mesh, run, functools.partial(step_of, information), {"clip_norm": 0.2}):
        torch.testing.assert_close(trained, weights, **CLOSE)
        assert {"loss_d", "loss_g_d"} < result.history[0].keys()


def weighted(model, batch, update):
    """Means over other numbers than the samples."""
    x, y = batch
    few = y != 0
    update(model["d"](x[few]).square().mean(), "d", weight=int(few.sum()))
    update((model["g"](x[few][:, :NOISE]) - x[few]).square().mean(), "g", weight=few.sum())


@ALL_MESHES
def test_means_over_other_numbers(run_on, mesh):
    """As many ranks as there are, the means are those of the whole batch."""
    weights, _ = plain(weighted)
    for _, trained in run_on(mesh, run, functools.partial(step_of, weighted), {}):
        torch.testing.assert_close(trained, weights, **CLOSE)


def stale(model, batch):
    scores = model["d"](model["g"](batch[0][:, :NOISE]))
    nbdist.update(bce(model["d"](batch[0]), 1.0), "d")
    nbdist.update(bce(scores, 1.0), "g")


@MESHES
def test_a_graph_through_old_weights_is_refused(run_on, mesh):
    """As by torch in one process; on a mesh that frees weights too."""
    with pytest.raises(TaskError, match=r"a loss goes through parameters as they were before nbdist\.update changed"):
        run_on(mesh, run, stale, {})


def one_model():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.float64)


def twice(model, batch):
    """One optimizer, which steps twice in a step, as adversarial training does."""
    nbdist.update(model(batch[0]).square().mean())
    nbdist.update((model(batch[0]) - 1).square().mean())
    return {"shift": model(batch[0]).mean()}


def run_one(world, step, options):
    model = one_model()
    task = Task.create(model, classes(SAMPLES), step=step, optimizer=ADAM, batch_size=BATCH, shuffle=False)
    return train_task(world, task, **options), model.state_dict()


@MESHES
def test_one_optimizer_that_steps_twice(run_on, mesh):
    """It needs no name, and the step may log."""
    model, (x, _) = one_model(), classes(SAMPLES)
    optimizer, shifts, losses = ADAM(model.parameters()), [], []
    for rows in torch.arange(SAMPLES).split(BATCH):
        for target in (0, 1):
            optimizer.zero_grad()
            loss = (model(x[rows]) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
        shifts.append(model(x[rows]).mean().item() * len(rows))
    for result, weights in run_on(mesh, run_one, twice, {}):
        torch.testing.assert_close(weights, model.state_dict(), **CLOSE)
        assert sum(losses) / SAMPLES == pytest.approx(result.history[0]["loss"], rel=1e-10)
        assert sum(shifts) / SAMPLES == pytest.approx(result.history[0]["shift"], rel=1e-10)


def importing(model, batch):
    from nbdist import update

    losses_of(model, batch, update)


def importing_all(model, batch):
    import nbdist as nb

    losses_of(model, batch, lambda loss, name: nb.update(loss, name))


class Holder:
    """A step that is a method, or an object."""

    def step(self, model, batch):
        gan(model, batch)

    __call__ = step


@pytest.mark.parametrize(
    "step", [importing, importing_all, Holder().step, Holder(), functools.partial(step_of, losses_of)],
    ids=["from", "import", "method", "object", "partial"],
)  # fmt: skip
def test_where_a_step_may_name_it(step):
    """In its own code, or in that of functions that this names."""
    task = Task.create(adversaries(), classes(SAMPLES), step=step, optimizer={"d": ADAM, "g": ADAM}, batch_size=BATCH)
    assert task.updates
    train_task(World(), task, steps=1)


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(name)


untouchable = Untouchable()


def recomputed(model, batch):
    return checkpoint(model, batch[0], use_reentrant=untouchable.how).mean()


def test_looking_for_it_reads_nothing_else(monkeypatch):
    """No attribute of the user's objects, and none of the functions of torch, which name hundreds of others."""
    read = []
    codes = own_loop._codes
    monkeypatch.setattr(own_loop, "_codes", lambda code: [read.append(code.co_filename), *codes(code)][1:])
    assert not own_loop.uses(recomputed, nbdist.update)
    assert {__file__} == {*read}


def apart(model, batch):
    """What is updated depends on the samples, so ranks differ."""
    nbdist.update(model["d"](batch[0]).mean(), "d")
    if bool((batch[0][:, 0] == classes(SAMPLES)[0][0, 0]).any()):
        nbdist.update(model["g"](batch[0][:, :NOISE]).mean(), "g")


def test_ranks_that_update_differently_are_refused(run_ranks):
    """On each of them, before it changes a weight with other gradients."""
    with pytest.raises(TaskError, match=r"ranks call nbdist\.update for other optimizers, or not equally often"):
        run_ranks(2, run, apart, {"check": "no"})


def once_or_twice(model, batch):
    for _ in range(1 + bool((batch[0][:, 0] == classes(SAMPLES)[0][0, 0]).any())):
        nbdist.update(model(batch[0]).square().mean())


def test_ranks_that_update_more_often_are_refused(run_ranks):
    """By an optimizer without a name too."""
    with pytest.raises(TaskError, match=r"or not equally often \(rank \d is at (nbdist|the end of)"):
        run_ranks(2, run_one, once_or_twice, {"check": "no"})


def of_large_models(world, step, options):
    choice.SHARED_ABOVE = 0  # else a model of this size would not share its weights
    return run(world, step, options)


def test_weights_are_not_shared(run_ranks):
    """Each rank steps for all parameters."""
    weights, _ = plain()
    for _, trained in run_ranks(2, of_large_models, gan, {}):
        torch.testing.assert_close(trained, weights, **CLOSE)


def no_name(model, batch):
    nbdist.update(model["d"](batch[0]).mean(), "critic")


def twice_the_same(model, batch):
    nbdist.update(model["d"](batch[0]).mean(), ["d", "d"])


def no_string(model, batch):
    nbdist.update(model["d"](batch[0]).mean(), model["d"])


def no_call(model, batch):
    if len(batch) > 2:
        nbdist.update(model["d"](batch[0]).mean(), "d")


def no_scalar(model, batch):
    nbdist.update(model["d"](batch[0]), "d")


def no_gradient(model, batch):
    nbdist.update(model["d"](batch[0]).mean().detach(), "d")


def nothing_named(model, batch):
    return model["d"](batch[0]).mean() + vars(nbdist)["__getattr__"]("update")(model["d"](batch[0]).mean(), "d")


MISTAKES = {
    "name": (no_name, "nbdist.update names optimizer 'critic', and the run has d, g"),
    "twice": (twice_the_same, r"nbdist.update names the optimizers \('d', 'd'\): give one, or several, each once"),
    "string": (no_string, "nbdist.update names optimizer by a value of type Sequential, and the run has d, g"),
    "call": (no_call, "the step has nbdist.update in its code, and has not called it for a batch"),
    "scalar": (
        no_scalar,
        r"the loss for optimizer d must be a scalar tensor, but it is a tensor of shape .*mean",
    ),
    "gradient": (no_gradient, "the loss for optimizer d does not require grad, so it trains nothing"),
    "unseen": (nothing_named, "nbdist.update is called outside of a training step, or where nbdist did not find it"),
}


@pytest.mark.parametrize(("step", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence(step, sentence):
    """Each names what was written, and the cure; the weights are as before."""
    modules = adversaries()
    task = Task.create(modules, classes(SAMPLES), step=step, optimizer={"d": ADAM, "g": ADAM}, batch_size=BATCH)
    with pytest.raises(TaskError, match=sentence):
        train_task(World(), task, epochs=1)
    torch.testing.assert_close(weights_of(modules), weights_of(adversaries()), rtol=0, atol=0)


def test_outside_of_a_step():
    """It does nothing there, and says so."""
    with pytest.raises(TaskError, match=r"nbdist\.update is called outside of a training step"):
        nbdist.update(torch.ones((), requires_grad=True).sum())


@pytest.mark.parametrize(("options", "sentence"), [
    ({"strategy": "tp"}, "the step updates with nbdist.update, and mesh tp=2 cuts layers or the model: use --strategy"),
    ({"strategy": "pp"}, "the step updates with nbdist.update, and mesh pp=2 cuts layers or the model: use --strategy"),
    ({"accumulate": 2}, "each rank computes one slice of a batch, and accumulate=2 makes several: leave it out"),
    ({"reproducible": 4}, "each rank computes one slice of a batch, and reproducible=4 makes several: leave it out"),
    ({"precision": "fp16"}, "fp16 scales the loss of a whole step: use bf16"),
])  # fmt: skip
def test_what_cannot_be_combined(options, sentence):
    """Is one sentence, before anything begins."""
    with pytest.raises(PlanError, match=sentence):
        Plan.create(ranks=2, cores=2, updates=True, **options)


def test_validation_data_need_a_function():
    """The step would train on them."""
    with pytest.raises(TaskError, match=r"it cannot measure the validation data: give evaluate=\.\.\."):
        Task.create(adversaries(), classes(SAMPLES), step=gan, optimizer={"d": ADAM, "g": ADAM}, val=classes(8))


def test_an_optimizer_with_a_closure_is_refused():
    """It would compute a loss of its own again."""
    with pytest.raises(TaskError, match="an optimizer needs a closure, to compute a loss again within its step: use"):
        Task.create(adversaries(), classes(SAMPLES), step=gan, optimizer={"d": ADAM, "g": torch.optim.LBFGS})


@pytest.mark.parametrize(("optimizer", "sentence"), [
    ({}, r"optimizer is a dict with the keys \[\]: give each a name"),
    ({0: "adam"}, r"optimizer is a dict with the keys \[0\]: give each a name"),
    ({"dd": "adam"}, "optimizer dd is given as adam, and the model has no module dd .* Did you mean 'd'"),
    ({"d": "adam", "g": "adamm"}, "unknown optimizer 'adamm': .* Did you mean 'adam'"),
])  # fmt: skip
def test_dicts_that_are_no_optimizers(optimizer, sentence):
    """Are refused by name."""
    with pytest.raises(TaskError, match=sentence):
        Task.create(adversaries(), classes(SAMPLES), step=gan, optimizer=optimizer)


def in_bfloat16(world, step):
    modules = {name: module.float() for name, module in adversaries().items()}
    data = tuple(part.float() if part.is_floating_point() else part for part in classes(SAMPLES))
    optimizer = {"d": ADAM, "g": ADAM}
    task = Task.create(modules, data, step=step, optimizer=optimizer, batch_size=BATCH, shuffle=False)
    train_task(world, task, precision="bf16", epochs=1)
    return weights_of(modules)


def test_half_precision_uses_the_new_weights():
    """Autocast keeps copies of weights in bfloat16, which an update makes old; the bits are those of a plain loop."""
    loop = PlainLoop({name: module.float() for name, module in adversaries().items()})
    data = tuple(part.float() if part.is_floating_point() else part for part in classes(SAMPLES))

    def update(loss, name, **_):
        with torch.autocast("cpu", enabled=False):
            PlainLoop.update(loop, loss, name)
        torch.clear_autocast_cache()

    for rows in torch.arange(SAMPLES).split(BATCH):
        loop.samples = len(rows)
        with torch.autocast("cpu", torch.bfloat16):
            losses_of(loop.modules, tuple(part[rows] for part in data), update)
    torch.testing.assert_close(in_bfloat16(World(), gan), weights_of(loop.modules), rtol=0, atol=0)
