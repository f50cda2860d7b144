"""What a training may use beside forward and backward, on every kind of mesh: as in one process."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
from problems import CLASSES, FEATURES, SGD, classes, seeded, train
from torch import nn
from torch.nn import functional as F
from zoo import CASES

from nbdist.core.comm.world import World
from nbdist.errors import PlanError
from nbdist.plan import Mesh

AXES = ["dp=2", "pp=2", "tp=2", "shard=2"]
HYBRIDS = ["dp=2,pp=2", "pp=2,tp=2", "shard=2,pp=2", "dp=2,shard=2", "dp=2,tp=2"]
MESHES = [*AXES, *(pytest.param(mesh, marks=pytest.mark.parity) for mesh in HYBRIDS)]
SCHEDULES = ["gpipe", "interleaved"]  # beside the usual one
SAMPLES, BATCH = 42, 16  # the last batch of an epoch holds 10
TOLERANCE = 1e-9


class Net(nn.Module):
    """Residual blocks with dropout; `spare` is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.spare = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.ups = nn.ModuleList(nn.Linear(8, 16) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))
        self.norm, self.drop, self.last = nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, CLASSES)

    def forward(self, x):
        hidden = self.first(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            hidden = hidden + self.drop(down(torch.tanh(up(hidden))))
        return self.last(self.norm(hidden))


class Sign(torch.optim.Optimizer):
    """A user's optimizer, with a state of tensors, numbers and a tensor of another shape than its parameter."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"mean": torch.zeros_like(parameter), "count": 0, "rate": torch.tensor(1.0)}
                state["count"] += 1
                state["rate"] *= 0.9
                state["mean"].lerp_(parameter.grad, 0.1)
                parameter.add_(torch.tanh(100 * state["mean"]), alpha=-group["lr"] * state["rate"].item())


def groups(parameters):
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


def in_groups(parameters):
    return torch.optim.AdamW(groups(parameters), lr=0.01)


def with_state(make, model):
    """A ready-made optimizer that has stepped before."""
    optimizer = make(groups(p for p in model.parameters() if p.requires_grad))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().cos() if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def own_step(model, batch):
    """Draws before and after its one call of the model, and returns the weight of its mean."""
    x, y = batch
    if model.training:
        x = x + 0.1 * torch.randn_like(x)
        x = torch.where(torch.rand(len(x), 1) < 0.5, x, -x)
    output = model(x)
    counted = (y != 0).sum()
    loss = F.cross_entropy(output, y.where(y != 0, -100), label_smoothing=0.1, ignore_index=-100)
    return loss + 0.01 * (F.dropout(output, 0.5, model.training)[y != 0]).pow(2).mean(), counted


def freeze(model):
    model.first.requires_grad_(False)
    model.ups[1].weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    return {"optimizer": SGD}


def ignored():
    """Half of the first batch and of the last one, and all of the one between."""
    x, y = classes(SAMPLES)
    y[: BATCH // 2] = y[BATCH : 2 * BATCH] = y[-5:] = -100
    return x, y


VAL = classes(13)
# What each is given, by the model.
FEATURES_BY_NAME = {
    "clipping": lambda model: {"clip_norm": 0.03, "optimizer": SGD},
    "clipping little": lambda model: {"clip_norm": 1e3, "optimizer": in_groups},
    "a rate a step": lambda model: {"lr_scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2)},
    "a rate an epoch": lambda model: {
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1), "schedule_by": "epoch",
    },
    "a cosine": lambda model: {
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4), "optimizer": SGD,
    },
    "a rate that follows": lambda model: {
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.9),
        "val": VAL, "metric": "accuracy", "epochs": 3,
    },
    "frozen": freeze,
    "frozen, groups": lambda model: freeze(model) | {"optimizer": in_groups, "clip_norm": 0.1},
    "groups": lambda model: {"optimizer": in_groups},
    "SGD with state": lambda model: {
        "optimizer": with_state(functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9), model)
    },
    "Adam with state": lambda model: {
        "optimizer": with_state(functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True), model), "clip_norm": 0.1,
    },
    "new Adam": lambda model: {"optimizer": torch.optim.NAdam(model.parameters(), lr=0.01)},
    "frozen, with state": lambda model: freeze(model) | {"optimizer": with_state(Sign, model)},
    "of the user's own": lambda model: {"optimizer": Sign},
    "accumulating": lambda model: {"accumulate": 2, "optimizer": SGD, "clip_norm": 0.1},
    "a step": lambda model: {"step": own_step, "optimizer": SGD, "val": VAL},
    "ignored targets": lambda model: {"optimizer": SGD, "clip_norm": 0.1, "shuffle": False},
}  # fmt: skip


def run(world, name, accumulate=None, **options):
    warnings.simplefilter("ignore")  # of schedulers that step before an optimizer that has not
    model = seeded(Net, torch.float64)
    given = {"batch_size": BATCH, "epochs": 2, "seed": 5, "optimizer": "adamw"} | FEATURES_BY_NAME[name](model)
    given["accumulate"] = accumulate or given.get("accumulate", 1)
    result, trained = train(
        world, model, ignored() if name == "ignored targets" else classes(SAMPLES), **given, **options
    )
    optimizer = given["optimizer"]
    state = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else None
    measured = [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]
    assert all(p.grad is None for p in model.parameters())
    return measured, trained, state


def run_all(world, names, options):
    return {name: run(world, name, **options) for name in names}


@functools.cache
def expected(name, slices):
    with torch.random.fork_rng():
        return run(World(), name, accumulate=slices, check="no")


def size_of(mesh):
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(","))


def check(run_ranks, mesh, names, **options):
    options |= {"strategy": mesh} | ({"microbatches": 2} if "pp" in mesh else {})
    ranks = run_ranks(size_of(mesh), run_all, names, options)
    wrong = []
    for name in names:
        accumulate = FEATURES_BY_NAME[name](seeded(Net, torch.float64)).get("accumulate", 1)
        slices = accumulate * Mesh.parse(mesh, size_of(mesh)).data * options.get("microbatches", 1)
        for rank, results in enumerate(ranks):
            try:
                torch.testing.assert_close(results[name], expected(name, slices), rtol=TOLERANCE, atol=TOLERANCE)
            except AssertionError as error:
                wrong.append(f"{name}, rank {rank}: {' '.join(str(error).split())}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_feature_on_every_mesh(run_ranks, mesh):
    """History, weights and the state of an optimizer that was given, on every rank."""
    check(run_ranks, mesh, [*FEATURES_BY_NAME])


@pytest.mark.parity
@pytest.mark.parametrize("channel", ["shared weights", "process group"])
def test_every_feature_on_other_channels(run_ranks, channel):
    """Shared weights take a part of them, and leave the others to replicas."""
    check(functools.partial(run_ranks, channel=channel), "dp=3", [*FEATURES_BY_NAME])


@pytest.mark.parity
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(run_ranks, schedule):
    """The pipeline schedule changes no result."""
    check(run_ranks, "pp=2", [*FEATURES_BY_NAME], schedule=schedule)


def test_the_features_do_what_they_are_for():
    """In one process: clipping binds, the rate falls, what is frozen or never used stays, the optimizer has stepped."""
    start = seeded(Net, torch.float64).state_dict()
    by_name = {name: expected(name, 2) for name in FEATURES_BY_NAME}
    assert all(torch.equal(start[name], trained["spare.weight"]) for name in ["spare.weight"]
               for _, trained, _ in [by_name["groups"], by_name["clipping"]])  # fmt: skip
    assert torch.equal(start["ups.1.weight"], by_name["frozen"][1]["ups.1.weight"])
    moved = {name: (trained["last.weight"] - start["last.weight"]).norm() for name, (_, trained, _) in by_name.items()}
    assert moved["clipping"] < 0.2 * moved["a cosine"]
    assert {"val_loss", "val_accuracy"} <= by_name["a rate that follows"][0][-1].keys()
    assert len(by_name["SGD with state"][2]["state"]) == len(start)


def tied(world, options):
    """A language model whose embedding is its head, clipped, with an optimizer that has a state."""
    warnings.simplefilter("ignore")
    case = CASES["GPT, tied"]
    model = case.model(torch.float64)
    optimizer = with_state(functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-3), model)
    result, trained = train(
        world, model, case.data(20, torch.float64), loss=case.loss, optimizer=optimizer, batch_size=8, epochs=1,
        clip_norm=0.2, **options,
    )  # fmt: skip
    return result.history[0]["loss"], trained, optimizer.state_dict()


@pytest.mark.parametrize("mesh", [*AXES[1:3], *MESHES[5:7]])
def test_tied_weights_count_once_in_the_norm(run_ranks, mesh):
    """However many ranks hold a part of them."""
    more = {"microbatches": 2} if "pp" in mesh else {}
    alone = tied(World(), {"accumulate": Mesh.parse(mesh, size_of(mesh)).data * more.get("microbatches", 1)})
    for rank in run_ranks(size_of(mesh), tied, {"strategy": mesh} | more):
        torch.testing.assert_close(rank, alone, rtol=1e-8, atol=1e-8)


def half_frozen(world, options):
    """The first stage, or the first rank, has nothing to train."""
    model = seeded(lambda: nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(4))), torch.float64)
    for layer in model[:3]:
        layer.requires_grad_(False)
    return train(world, model, classes(16), optimizer=SGD, batch_size=8, clip_norm=0.1, **options)[1]


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "pp=2"},
        {"strategy": "pp=2", "schedule": "interleaved", "precision": "fp16"},
        {"strategy": "shard=2"},
    ],
)
def test_a_rank_with_nothing_to_train(run_ranks, options):
    """It still takes part in the forward and backward of the others."""
    more = {"microbatches": 2} if "pp" in options["strategy"] else {}
    alone = half_frozen(World(), {"accumulate": 2, "precision": options.get("precision", "full")})
    for rank in run_ranks(2, half_frozen, options | more):
        torch.testing.assert_close(rank, alone, rtol=1e-8, atol=1e-8)


def in_half(world, options):
    results = []
    for precision in ("bf16", "fp16"):
        model = seeded(Net)
        result, trained = train(
            world, model, classes(SAMPLES, torch.float32), batch_size=BATCH, epochs=2, optimizer=SGD, clip_norm=1.0,
            precision=precision, **options,
        )  # fmt: skip
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        results.append(([row["loss"] for row in result.history], trained))
    return results


@pytest.mark.parametrize("mesh", MESHES)
def test_half_precision_on_every_mesh(run_ranks, mesh):
    """Close to one process: half precision keeps two or three digits."""
    more = {"microbatches": 2} if "pp" in mesh else {}
    alone = in_half(World(), {"accumulate": Mesh.parse(mesh, size_of(mesh)).data * more.get("microbatches", 1)})
    ranks = run_ranks(size_of(mesh), in_half, {"strategy": mesh} | more)
    for rank in ranks:
        torch.testing.assert_close(rank, alone, rtol=0.01, atol=0.003)
        torch.testing.assert_close(rank, ranks[0], rtol=0, atol=0)


def overflowing(world, options):
    """Steps whose gradients are too large at first for fp16 times the scale: weights after each one."""
    model = seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)))
    seen = []

    def step(model, batch):
        return 3e2 * F.cross_entropy(model(batch[0]), batch[1])

    for steps in range(8):
        net = copy.deepcopy(model)
        train(world, net, classes(BATCH, torch.float32), step=step, batch_size=BATCH, steps=steps + 1,
              optimizer=functools.partial(torch.optim.SGD, lr=1e-4), precision="fp16", **options)  # fmt: skip
        seen.append({name: (tensor - model.state_dict()[name]) for name, tensor in net.state_dict().items()})
    return seen


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "tp=2", "shard=2"])
def test_an_overflow_skips_the_step_on_all_ranks(run_ranks, mesh):
    """The loss scale is halved until gradients fit; then training continues."""
    more = {"microbatches": 2} if "pp" in mesh else {}
    slices = Mesh.parse(mesh, size_of(mesh)).data * more.get("microbatches", 1)
    alone = overflowing(World(), {"accumulate": slices})
    moved = [any(bool(change.any()) for change in changes.values()) for changes in alone]
    assert moved[0] is False
    assert moved[-1] is True
    assert moved == sorted(moved)
    for rank in run_ranks(size_of(mesh), overflowing, {"strategy": mesh} | more):
        assert [any(bool(change.any()) for change in changes.values()) for changes in rank] == moved
        torch.testing.assert_close(rank, alone, rtol=0.02, atol=1e-5)


def refused(world, name, mesh):
    model = seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.Linear(8, CLASSES, bias=False)))
    train(world, model, classes(8, torch.float32), optimizer=name, strategy=mesh)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_an_optimizer_of_whole_matrices(run_ranks, name):
    """It would silently compute something else where they are cut; a pipeline cuts none."""
    for mesh in ("shard=2", "tp=2"):
        with pytest.raises(PlanError, match=f"tensor.*, which mesh {mesh} splits: use another"):
            run_ranks(2, refused, name, mesh)
    run_ranks(2, refused, name, "pp=2")


def with_statistics(world, mesh):
    """The last batch of 6 has three slices, so that the second rank has one less."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)), torch.float64
    )
    return train(world, model, classes(22), batch_size=16, accumulate=2, optimizer=SGD, strategy=mesh)[1]


def test_slices_without_samples_leave_no_trace(run_ranks):
    """Under `shard`, ranks compute padding slices for the others' collectives; running statistics ignore them."""
    expected = run_ranks(2, with_statistics, "dp=2")
    for rank in run_ranks(2, with_statistics, "shard=2"):
        torch.testing.assert_close(rank, expected[0], rtol=TOLERANCE, atol=TOLERANCE)


def penalized(model, batch):
    x = batch[0].clone().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return F.cross_entropy(y, batch[1]) + slope.square().mean()


def train_penalized(world, mesh, check):
    train(
        world,
        seeded(Net, torch.float64),
        classes(SAMPLES),
        step=penalized,
        strategy=mesh,
        check=check,
        batch_size=BATCH,
    )


@pytest.mark.parametrize("mesh", ["pp=2", "dp=2,pp=2"])
@pytest.mark.parametrize("check", ["yes", "no"])
def test_gradients_of_what_a_model_returns_are_refused_where_its_graph_is_cut(run_ranks, mesh, check):
    """One sentence, with the strategy that does it."""
    words = r"the step takes a gradient through the model itself .* of mesh \S+: use the strategy data"
    with pytest.raises(PlanError, match=words):
        run_ranks(size_of(mesh), train_penalized, mesh, check)
