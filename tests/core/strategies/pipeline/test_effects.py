"""What a forward leaves beside its output on a pipeline: buffers and attributes, as in one process."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import seeded, train
from torch import nn
from torch.nn import functional as F

from nbdist.core.strategies.pipeline.partition import split
from nbdist.errors import PlanError, TaskError

SAMPLES, BATCH, MICROBATCHES, WIDTH = 24, 8, 2, 6
GRADIENT = functools.partial(torch.optim.SGD, lr=0.05)


class Net(nn.Module):
    """Two halves; `between` sees the values that cross the cut."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        for name in ("calls", "other"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("mean", "rows"):
            self.register_buffer(name, torch.zeros(WIDTH))

    def between(self, x):
        return x

    def forward(self, x):
        return self.last(torch.tanh(self.between(self.first(x))))


class Counter(Net):
    """A count that forward also reads."""

    def between(self, x):
        if self.training:
            self.calls.add_(1)
        return x / (1 + self.calls)


class Average(Net):
    """A moving average without gradients, which the output reads."""

    def between(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
        return x - self.mean * x


class Assigned(Net):
    """Buffers are assigned to, not written in place; autograd has saved the former values."""

    def between(self, x):
        x = x * (1 + self.mean)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            self.calls = self.calls + 1
            self.mean.mul_(0.9)
        return x + self.calls


class Through(Net):
    """Writes that autograd does not see, to what its backward reads."""

    def between(self, x):
        if self.training:
            self.mean.data.copy_(0.5 * self.mean + x.detach().mean(0))
            self.calls.data += 1
        return x * self.mean


class Items(Net):
    """Items, augmented assignments and several buffers at once."""

    def between(self, x):
        if self.training:
            self.rows[2] = x.detach().sum()
            self.rows[3:] += x.detach().mean(0)[3:]
            self.calls += 1
            self.rows.index_copy_(0, torch.tensor([0, 1]), x.detach()[0, :2])
            torch._foreach_add_([self.calls, self.other], 2.0)
        return x + self.rows.tanh()


class Codebook(nn.Module):
    """A quantizer whose codes are moving averages: it branches on values, so it is called as a whole."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))
        self.register_buffer("counts", torch.ones(4))

    def forward(self, x):
        chosen = torch.cdist(x.detach(), self.codes).argmin(1)
        if self.training and float(self.counts.sum()) < 1e6:
            hot = F.one_hot(chosen, 4).to(x.dtype)
            self.counts.data.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            self.codes.data.copy_(0.9 * self.codes + 0.1 * (hot.t() @ x.detach()))
        return x + (self.codes[chosen] - x).detach()


class Quantized(Net):
    def __init__(self):
        super().__init__()
        self.book = Codebook()

    def between(self, x):
        return self.book(x)


class Gate(nn.Module):
    """Sets an auxiliary loss at each call."""

    def __init__(self, branches):
        super().__init__()
        self.mix, self.branches, self.aux = nn.Linear(WIDTH, WIDTH), branches, None

    def forward(self, x):
        gates = self.mix(x).softmax(-1)
        if self.branches and float(gates.detach().sum()) < 0:
            return x
        self.aux = gates.mean(0).square().sum()
        return x * gates


class Experts(Net):
    """Its child is traced through."""

    def __init__(self, branches=False):
        super().__init__()
        self.gate, self.total = Gate(branches), None

    def between(self, x):
        x = self.gate(x)
        self.total = 2 * self.gate.aux
        self.seen = x.shape[0]
        return x


class Branching(Experts):
    """Its child is called as a whole."""

    def __init__(self):
        super().__init__(branches=True)


class Counts(nn.Module):
    """Counts its calls in Python."""

    def __init__(self):
        super().__init__()
        self.calls, self.last = 0, 0.0

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.last = float(x.detach().sum())
        return x / (1 + 0.1 * self.calls)


class Python(Net):
    def __init__(self):
        super().__init__()
        self.counts, self.end = Counts(), nn.Linear(1, 1)

    def between(self, x):
        return self.counts(x)

    def forward(self, x):
        return self.end(super().forward(x))


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def with_aux(model, batch):
    """The step resets and reads attributes, as training scripts of mixtures of experts do."""
    model.gate.aux = None
    return loss(model, batch) + 0.1 * model.gate.aux + 0.01 * model.total / model.seen


def with_count(model, batch):
    return loss(model, batch) * model.counts.calls + 1e-3 * model.counts.last


def with_buffer(model, batch):
    return loss(model, batch) * model.calls


CASES = {
    "counter": (Counter, loss), "average": (Average, loss), "assigned": (Assigned, loss), "through": (Through, loss),
    "items": (Items, loss), "codebook": (Quantized, loss), "experts": (Experts, with_aux),
    "branching": (Branching, with_aux), "python": (Python, with_count),
}  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True)


def attributes(model):
    """Numbers and tensors among the attributes, by module and name."""
    return {
        f"{path}.{name}": torch.as_tensor(value).detach().clone()
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, torch.Tensor)) and name not in vars(nn.Module())
    }


def state(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def by_hand(make, step, replicas=1):
    """A plain loop over the microbatches of each replica in turn; the replicas' buffers are averaged after an epoch."""
    model = seeded(make, torch.float64)
    optimizer = GRADIENT(model.parameters())
    buffers = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(replicas)]
    x, y = data()
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH):
            optimizer.zero_grad()
            size = BATCH // MICROBATCHES // replicas
            for i in range(MICROBATCHES * replicas):
                rows = slice(start + i * size, start + (i + 1) * size)
                own = buffers[i // MICROBATCHES]
                for name in own:
                    place, _, key = name.rpartition(".")
                    model.get_submodule(place)._buffers[key] = own[name]
                (step(model, (x[rows], y[rows])) * size / BATCH).backward()
                own.update(model.named_buffers())
            optimizer.step()
        for name in buffers[0]:  # after each epoch
            mean = torch.stack([own[name] for own in buffers]).mean(0)
            for own in buffers:
                own[name] = mean.clone()
    return {**state(model), **buffers[0]}, attributes(model)


def on_mesh(world, make, step, mesh):
    model = seeded(make, torch.float64)
    slices = {"microbatches": MICROBATCHES, "split_at": ["last"]} if "pp" in mesh else {"accumulate": MICROBATCHES}
    train(
        world, model, data(), step=step, optimizer=GRADIENT, batch_size=BATCH, shuffle=False, epochs=2, strategy=mesh,
        check="mesh", **slices,
    )  # fmt: skip
    return state(model), attributes(model)


@pytest.mark.parametrize("name", CASES)
def test_buffers_and_attributes_are_those_of_one_process(run_ranks, name):
    """Weights, buffers and the attributes that forward leaves, on every rank."""
    make, step = CASES[name]
    expected = by_hand(make, step)
    ranks = run_ranks(2, on_mesh, make, step, "pp=2")
    for trained in ranks:
        torch.testing.assert_close(trained, expected, rtol=1e-10, atol=1e-12)


class Assigns(nn.Module):
    """Assigns to its buffer where it is called as a whole."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training and float(x.detach().sum()) < 1e9:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
        return x + self.mean


class Whole(Net):
    def __init__(self):
        super().__init__()
        self.assigns = Assigns()

    def between(self, x):
        return self.assigns(x)


@pytest.mark.parametrize(("make", "mesh"), [
    (Average, "dp=2,pp=2"), (Assigned, "dp=2,pp=2"), (Quantized, "dp=2,pp=2"), (Whole, "dp=2,pp=2"), (Whole, "dp=2"),
    (Assigned, "dp=2"),
])  # fmt: skip
def test_replicas_average_their_buffers(run_ranks, make, mesh):
    """Those that forward assigns anew too, on a pipeline and without one."""
    expected, _ = by_hand(make, loss, replicas=2)
    for trained, _ in run_ranks(4 if "pp" in mesh else 2, on_mesh, make, loss, mesh):
        torch.testing.assert_close(trained, expected, rtol=1e-10, atol=1e-12)


def test_a_buffer_that_is_written_on_another_rank_cannot_be_read_by_the_step(run_ranks):
    """The rank of the step says which; the other one says that it is gone."""
    with pytest.raises(PlanError, match=r"reads buffer calls, which the model's forward writes on another rank"):
        run_ranks(2, on_mesh, Counter, with_buffer, "pp=2")


def interleaved(world):
    with pytest.raises(PlanError) as caught:
        train(
            world, seeded(Python, torch.float64), data(), step=loss, optimizer=GRADIENT, batch_size=BATCH, epochs=1,
            strategy="pp=2", microbatches=MICROBATCHES, check="no", schedule="interleaved",
            split_at=["counts", "last", "end"],
        )  # fmt: skip
    return str(caught.value)


def test_two_stages_of_a_rank_do_not_share_a_count(run_ranks):
    """Every rank says so before a weight is sent."""
    for message in run_ranks(2, interleaved):
        assert "forward counts in self.counts.calls" in message


class RootCount(Net):
    seen = 0

    def between(self, x):
        self.seen += 1
        return x


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(x.shape[0])
        return x


class ChildLog(Net):
    def __init__(self):
        super().__init__()
        self.grows = Grows()

    def between(self, x):
        return self.grows(x)


class PlainTensor(Net):
    def __init__(self):
        super().__init__()
        self.ema = torch.zeros(WIDTH)

    def between(self, x):
        self.ema = 0.5 * self.ema + x.detach().mean(0)
        return x * self.ema


class OnlyInEvaluation(Net):
    def between(self, x):
        if not self.training:
            self.seen = getattr(self, "seen", 0) + 1
        return x


class Layerdrop(Net):
    """Branches on a random number: tracing takes one of the branches."""

    def between(self, x):
        return x if torch.rand(()) < 0.5 else 2 * x


@pytest.mark.parametrize(("make", "says"), [
    (RootCount, "changes self.seen, whose value depends on the calls before"),
    (ChildLog, "changes self.grows.log"),
    (PlainTensor, "changes self.ema"),
    (OnlyInEvaluation, "changes self.seen"),
    (Layerdrop, "branches on tensor values"),
])  # fmt: skip
def test_what_a_trace_would_lose_is_refused(make, says):
    with pytest.raises(TaskError) as caught:
        split(seeded(make), (torch.randn(4, WIDTH),), at=["last"])
    assert says in str(caught.value)


class Table(Net):
    """What only the first call sets is no effect."""

    table = None

    def between(self, x):
        if self.table is None:
            self.table = torch.arange(float(WIDTH))
        return x + self.table


def test_a_table_that_is_made_once_is_no_effect():
    model = seeded(Table)
    assert split(model, (torch.randn(4, WIDTH),), at=["last"]).effects == ()
    assert model.table is None


class Positions(Net):
    """Reads a device in the first stage, and uses it in the last."""

    def forward(self, x):
        device = x.device
        x = torch.tanh(self.first(x))
        return self.last(x) + torch.arange(x.shape[0], device=device)[:, None]


def test_a_device_is_no_value_that_crosses_a_cut():
    parts = split(seeded(Positions), (torch.randn(4, WIDTH),), at=["last"], kinds=["fx"])
    assert parts.bytes_crossing == [4 * WIDTH * 4]
