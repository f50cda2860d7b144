"""The check before the first update: what it refuses, what it notes, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings

import pytest
import torch
from problems import CLASSES, FEATURES, assert_same_bits, classes, mlp, seeded, train, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nbdist
from nbdist.core.check import step_check
from nbdist.core.comm.world import World
from nbdist.core.params.program_state import ProgramState
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.bucketed_reducer import BucketedReducer
from nbdist.errors import PlanError, TaskError
from nbdist.telemetry import Noted, RunStarted, Sink

RUN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": 3, "shuffle": False}
TWO_SLICES = {**RUN, "accumulate": 2}


class Kept(Sink):
    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)

    @property
    def notes(self):
        return [event.text for event in self.events if isinstance(event, Noted)]

    @property
    def checked(self):
        return next(event.checked for event in self.events if isinstance(event, RunStarted))


def alone(model, step=None, data=None, **options):
    """One rank that runs two slices a step; returns what its events say."""
    sink = Kept()
    given = {"step": step} if step is not None else {"loss": "cross_entropy"}
    train(World(), model, data or classes(32), sinks=[sink], **given, **{**TWO_SLICES, **options})
    return sink


def sums(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def contrasts(model, batch):
    """Each sample against all others of its slice."""
    y = model(batch[0])
    return F.cross_entropy(y @ y.T, torch.arange(len(y)))


def centred(model, batch):
    """The loss is a mean over samples; its gradient also depends on the batch."""
    y = model(batch[0])
    return (y * (1 + y.mean().detach() - y.mean())).square().mean() * 0 + centre(y).mean()


class Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.abs().mean() * torch.arange(len(gradient))[:, None] * len(gradient)


centre = Centre.apply


def hardest(model, batch):
    """It takes more samples than the check reads at first."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").topk(3).values.mean()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            sums,
            r"of its 2 slices is \S+, and their sum is the loss: .*divide it by the number",
        ),
        (hardest, r"the loss of 8 samples in one batch is \S+, but the mean of those of its 2 slices is \S+ .*no mean"),
        (contrasts, r"is no mean over samples.*`return loss, mask.sum\(\)`"),
        (centred, r"the gradient of \S+ for 5 samples in one batch is not the mean of those of its 2 slices"),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_refused_before_the_update(step, words):
    """With the lines to write; the weights are those before."""
    model = mlp()
    before = weights(model)
    with pytest.raises(TaskError, match=re.compile(words, re.DOTALL)):
        alone(model, step)
    assert_same_bits(before, weights(model))


class Contrastive(nn.Module):
    """Two directions, each a mean over the samples of a slice; half of their sum counts two in a slice of two."""

    def __init__(self):
        super().__init__()
        self.tower = mlp()

    def forward(self, x, labels):
        near = self.tower(x) @ self.tower(x.flip(1)).T
        targets = torch.arange(len(x))
        return {"loss": (F.cross_entropy(near, targets) + F.cross_entropy(near.T, targets)) / 2.0}


def test_a_loss_that_is_known_as_no_mean_in_some_slices_only_is_refused():
    """Though slices of the size that the run has would be averaged."""
    x, y = classes(32)
    model = Contrastive()
    before = weights(model)
    with pytest.raises(TaskError, match=r"it is no mean over samples|is not recognised as a mean"):
        train(World(), model, {"x": x, "labels": y}, loss=None, **TWO_SLICES)
    assert_same_bits(before, weights(model))


def test_one_slice_may_have_any_loss():
    """There is nothing to average."""
    model, expected = mlp(), mlp()
    alone(model, sums, accumulate=1)
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    x, y = classes(32)
    for rows in torch.arange(24).split(8):
        optimizer.zero_grad()
        sums(expected, (x[rows], y[rows])).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected))


class Samples(torch.utils.data.Dataset):
    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, i):
        return self.parts[0][i], self.parts[1][i]


class Noisy(nn.Module):
    """BatchNorm, with and without running statistics, and dropout in three forms."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.bare, self.drop = nn.BatchNorm1d(16, track_running_stats=False), nn.Dropout(0.5)
        self.mix = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        x = self.drop(self.bare(self.norm(self.first(x))))
        return self.last(F.dropout(self.mix(x[:, None], x[:, None], x[:, None])[0][:, 0], 0.2, self.training))


def test_layers_that_are_documented_to_see_a_slice_are_noted():
    """BatchNorm; dropout is left out of the comparison with the whole batch."""
    sink = alone(seeded(Noisy, torch.float64))
    (note,) = sink.notes
    assert note.startswith("norm and 1 more (BatchNorm) uses the statistics of each slice")
    assert sink.checked.startswith("loss, ")


def noisy_sum(model, batch):
    """As the loss of a variational autoencoder: noise for each sample, and a sum over them."""
    return F.cross_entropy(model(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1], reduction="sum")


def noisy_mean(model, batch):
    x = batch[0] + torch.rand(len(batch[0]), 6, dtype=batch[0].dtype) + torch.empty_like(batch[0]).uniform_(1, to=2)
    return F.cross_entropy(model(x + torch.empty_like(x).normal_(0.5)), batch[1])


def test_a_loss_with_noise_is_compared_with_the_whole_batch():
    """With the same noise for all samples: a sum is refused, a mean is not."""
    with pytest.raises(TaskError, match="their sum is the loss"):
        alone(mlp(), noisy_sum)
    assert alone(mlp(), noisy_mean).notes == []


def own_generator(model, batch):
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(3))
    return F.cross_entropy(model(batch[0]), batch[1]) * (1 + drawn)


def test_a_loss_with_a_number_of_a_generator_of_its_own_is_a_mean():
    """The same number in each slice, which torch's own generators know nothing of."""
    assert alone(mlp(), own_generator).notes == []


def draws(x):
    """Numbers for each sample from whatever torch can draw from; some depend on the sample."""
    logits, likely, distributions = torch.cat([x, -x], 1), x.sigmoid(), torch.distributions
    drawn = [
        torch.normal(x, 0.5), torch.normal(0.0, likely), torch.normal(0.0, 1.0, x.shape, dtype=x.dtype),
        torch.bernoulli(likely), torch.zeros_like(x).bernoulli_(likely), torch.zeros_like(x).bernoulli_(0.3),
        torch.randint(5, x.shape), torch.randint(2, 5, x.shape), torch.randint(5, size=x.shape),
        torch.randint(low=1, high=5, size=x.shape), torch.multinomial(likely, num_samples=1),
        torch.randint_like(x, 3), torch.poisson(x.abs()),
        torch.multinomial(likely, 2)[:, :1], torch.multinomial(likely, 3, replacement=True)[:, :1],
        F.rrelu(x, training=True), F.gumbel_softmax(x), F.gumbel_softmax(x, hard=True), torch.randn(x.shape),
        torch.empty_like(x).exponential_(2.0), torch.empty_like(x).log_normal_(), torch.empty_like(x).geometric_(0.5),
        torch.empty_like(x).random_(3),
        distributions.Normal(x, likely).rsample(), distributions.Normal(x, 1.0).sample(), torch.rand(size=x.shape),
        distributions.Bernoulli(logits=x).sample(), distributions.Categorical(logits=logits).sample()[:, None],
        distributions.Gamma(likely, 1.0).rsample(), distributions.Dirichlet(likely).rsample(),
    ]  # fmt: skip
    return sum(each.to(x.dtype) for each in drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whatever_is_drawn_is_the_same_in_slices_and_in_the_batch(dtype):
    """So a sum is refused whatever noise it has, and a mean is not."""
    data = classes(32, dtype)

    def loss(reduction):
        return lambda model, batch: F.cross_entropy(
            model(batch[0] + 0.1 * draws(batch[0])), batch[1], reduction=reduction
        )

    with pytest.raises(TaskError, match="their sum is the loss"):
        alone(mlp(dtype), loss("sum"), data)
    assert alone(mlp(dtype), loss("mean"), data).notes == []


def test_numbers_that_must_differ_are_named_as_not_compared():
    """A step that draws an order of the batch has no loss of the whole batch to compare with."""
    sink = alone(
        mlp(), lambda model, batch: F.cross_entropy(model(batch[0] + batch[0][torch.randperm(len(batch[0]))]), batch[1])
    )
    assert sink.notes == ["slices were not compared with the whole batch: the step draws random numbers"]


def off_by_one_percent(world, what, dtype, options):
    """Train with a fault that is planted behind the gradient sync, or behind the average of buffers."""
    finish, average = BucketedReducer.finish, Strategy.average_buffers

    def faulty_finish(self, *args):
        totals = finish(self, *args)
        self._parameters[4].grad.mul_(1.01)
        return totals

    def faulty_average(self):
        average(self)
        self.table.buffers["1.running_var"].mul_(1.01)

    if what == "gradient":
        BucketedReducer.finish = faulty_finish
    elif what == "buffer":
        Strategy.average_buffers = faulty_average
    try:
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), dtype)
        result, _ = train(world, model, classes(32, dtype), loss="cross_entropy", **RUN, **options)
    except PlanError as error:
        return str(error)
    finally:
        BucketedReducer.finish, Strategy.average_buffers = finish, average
    return result.plan.checked


KINDS = {
    "float64": (torch.float64, {}), "float32": (torch.float32, {}), "half": (torch.bfloat16, {}),
    "bf16": (torch.float32, {"precision": "bf16"}), "fp16": (torch.float32, {"precision": "fp16"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "words"), [("gradient", "gradient of 3.weight is"), ("buffer", "1.running_var is")])
def test_a_fault_of_one_percent_is_found(run_ranks, kind, what, words):
    """In any dtype, on all ranks, before the first update; and without it nothing is refused."""
    for found in run_ranks(2, off_by_one_percent, what, *KINDS[kind]):
        assert words in found
        assert found.startswith("on mesh dp=2 ")
    for found in run_ranks(2, off_by_one_percent, "", *KINDS[kind]):
        assert found == "loss, 6 gradients, 6 updates, 3 buffers as in one process"


class Residual(nn.Module):
    """Gradients of small biases and of weights behind norms: the first are added up, the second are magnified."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(self.norm(x)).tanh()
        return self.last(self.norm(x))[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_of_slices_is_no_difference_from_the_whole_batch(kind):
    """Slices of other sizes than a power of two, whose shares of the batch half precision rounds."""
    dtype, options = KINDS[kind]
    for seed in range(10):
        torch.manual_seed(seed)
        model, x = Residual().to(dtype), torch.randn(12, 6).to(dtype)
        data = x, x.sum(1)
        options = {"batch_size": 12, "steps": 1, "accumulate": 3, "seed": seed, **options}
        result, _ = train(World(), model, data, loss="mse", optimizer="sgd", **options)
        assert "loss, 12 gradients, 12 updates as in one process" == result.plan.checked


class Counting(nn.Module):
    """Buffers that forward computes from its batch: a sum, a maximum, and one that any slice would give."""

    def __init__(self):
        super().__init__()
        self.last, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(6)
        self.register_buffer("samples", torch.zeros(()))
        self.register_buffer("largest", torch.full((6,), -9.0))
        self.register_buffer("weight", torch.zeros(3, 6))

    def forward(self, x):
        with torch.no_grad():
            self.samples += len(x)
            self.largest.copy_(torch.maximum(self.largest, x.amax(0)))
            self.weight.copy_(self.last.weight)
        return self.last(self.norm(x))


def notes_of_counting(world):
    sink = Kept()
    train(world, seeded(Counting), classes(32, torch.float32), **RUN, sinks=[sink])
    return sink.notes


def test_a_buffer_that_the_whole_batch_would_change_otherwise_is_noted(run_ranks):
    """Sums and maxima over ranks are averaged; BatchNorm has a note of its own."""
    notes = [note for note in run_ranks(2, notes_of_counting)[0] if "BatchNorm" not in note]
    assert 1 == len(notes)
    assert notes[0].startswith("buffer samples and 1 more is not what the whole batch in one process gives")


class LateWeights(nn.Module):
    """Its weights are drawn in the first forward."""

    def __init__(self):
        super().__init__()
        self.last, self.ready = nn.Linear(6, 3), False

    def forward(self, x):
        if not self.ready:
            self.ready = True
            nn.init.normal_(self.last.weight.data)
        return self.last(x)


def late_weights(world):
    with pytest.raises(PlanError) as error:
        train(world, seeded(LateWeights), classes(32, torch.float32), **RUN)
    return str(error.value)


def test_weights_that_are_made_in_the_first_forward_are_no_fault_of_the_optimizer(run_ranks):
    """The cure is one forward before."""
    for text in run_ranks(2, late_weights):
        assert "optimizer computes" not in text
        assert "Run one forward before the training" in text


class NormalizesLarge(torch.optim.SGD):
    """Its update of a tensor depends on the norm of all of it, for tensors larger than those of the trial."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.numel() > 3000:
                    parameter.grad.div_(parameter.grad.norm())
        return super().step(closure)


def normalizes_large(world):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 1100), nn.Tanh(), nn.Linear(1100, 3)))
    optimizer = NormalizesLarge(model.parameters(), lr=0.1)
    with pytest.raises(PlanError) as error:
        train(
            world,
            model,
            classes(32, torch.float32),
            loss="cross_entropy",
            batch_size=8,
            steps=1,
            optimizer=optimizer,
            strategy="shard",
        )
    return str(error.value), len(optimizer.state), weights(model)


def test_an_update_of_parts_that_is_not_part_of_the_update_is_found(run_ranks):
    """Of an optimizer that a trial on small tensors does not show; the weights are those before."""
    expected = weights(seeded(lambda: nn.Sequential(nn.Linear(6, 1100), nn.Tanh(), nn.Linear(1100, 3))))
    for error, states, after in run_ranks(2, normalizes_large):
        assert re.search(r"on mesh shard=2 the update of \S+ is up to .* Use another one, such as adamw", error)
        assert 0 == states
        assert_same_bits(expected, after)


def with_memory(world, free):
    """The result of the check where so many bytes are free."""
    real, step_check.available_bytes = step_check.available_bytes, lambda: free
    try:
        return train(world, mlp(), classes(32), loss="cross_entropy", **RUN)[0].plan.checked
    finally:
        step_check.available_bytes = real


class Assigns(torch.optim.SGD):
    """Writes in place, and then assigns what it has computed."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.5)
            parameter.data = parameter.data - 0.1 * parameter.grad


def assigned(world, strategy, check):
    model = mlp()
    train(
        world, model, classes(32), loss="cross_entropy", batch_size=8, steps=1, strategy=strategy, shuffle=False,
        optimizer=Assigns(model.parameters(), 0.1), check=check,
    )  # fmt: skip
    return weights(model)


@pytest.mark.parametrize("strategy", ["data", "shard", "tensor"])
def test_an_update_that_assigns_data_leaves_no_trace(run_ranks, strategy):
    """The run begins with the weights that it was given."""
    expected = run_ranks(2, assigned, "data", "no")[0]
    torch.testing.assert_close(run_ranks(2, assigned, strategy, "yes")[0], expected, rtol=1e-9, atol=1e-9)


def keeps_on_one_rank(world):
    kept = []

    def step(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if world.rank == 0:
            kept.append(loss.item())
        return loss

    return train(world, mlp(), classes(32), step=step, **RUN)[0].plan.checked


@pytest.mark.parametrize("channel", ["shared memory", "process group"])
def test_a_step_may_keep_something_on_one_rank_only(run_ranks, channel):
    """All ranks run as many passes."""
    for found in run_ranks(2, keeps_on_one_rank, channel=channel):
        assert found.startswith("loss, 4 gradients")


def test_what_was_checked_once_is_no_sum_in_the_next_run():
    """A factor that equals the size of a slice was seen in slices of other sizes, and is in a run without check."""
    plus = lambda o, t: F.cross_entropy(o, t) + 4.0 * o.abs().mean(1).mean()  # noqa: E731 - a loss as users write it
    model, (x, y) = mlp(), classes(32)
    results = [
        nbdist.train(model, (x, y), loss=plus, accumulate=2, batch_size=8, steps=2, verbose=False, record=False)
        for _ in range(2)
    ]
    assert ["finished", "finished"] == [result.state for result in results]


def test_large_tensors_of_an_optimizer_are_put_back():
    """Also in its own attributes, within containers."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.shadow = {"all": [torch.zeros(3)]}
    state = ProgramState({"optimizer": optimizer}, large_bytes=1)
    optimizer.shadow["all"][0].add_(1)
    assert ["optimizer.shadow['all'][0]"] == state.changes()
    state.restore()
    assert [0.0, 0.0, 0.0] == optimizer.shadow["all"][0].tolist()


def warns(model, batch):
    warnings.warn("look at this", stacklevel=1)
    return F.cross_entropy(model(batch[0]), batch[1])


def test_a_warning_of_the_step_is_shown_by_the_run():
    """Not only in the check, where nobody sees it."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        alone(mlp(), warns)
    assert ["look at this"] == [str(each.message) for each in shown if each.category is UserWarning]


def test_a_loss_without_gradient_is_a_sentence():
    """As it is without the check."""
    with pytest.raises(TaskError, match="the loss that the step returns does not require grad"):
        alone(mlp(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]).detach())


def test_where_memory_is_short_less_is_compared(run_ranks):
    """It says what was left out, and what it needs."""
    size = sum(tensor.nbytes for tensor in mlp().state_dict().values())
    (found, _), (nothing, _) = run_ranks(2, with_memory, 12 * size), run_ranks(2, with_memory, 4 * size)
    assert "loss as in one process; gradients were not compared: one process needs 0 MiB for it, 0 are free" == found
    assert "not checked: it needs 0 MiB on each rank, of which 0 are free" == nothing


def sums_if_large(model, batch):
    """A mean for the weights that the model starts with, and a sum for those of the checkpoint."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.sum() if next(model.parameters()).abs().max() > 100 else losses.mean()


def test_a_resumed_run_is_checked_with_the_weights_of_its_checkpoint(tmp_path):
    """They are those about to be used; where it is refused, the model is as before."""
    model, fresh, given = mlp(), mlp(), {"checkpoint": str(tmp_path), "steps": 4}
    with torch.no_grad():
        next(model.parameters()).mul_(1000)
    alone(model, sums_if_large, **given, check="no")
    before = weights(fresh)
    with pytest.raises(TaskError, match="it is no mean over samples"):
        alone(fresh, sums_if_large, resume=str(tmp_path), steps=8)
    assert_same_bits(before, weights(fresh))


def steps_with_and_without(world, options):
    """The bits of a run, its events, and what its step saw: with the check, and without."""
    runs = []
    for check in ("yes", "no"):
        seen, model = [], seeded(Noisy)
        model.calls = 0

        def step(model, batch, seen=seen):
            seen.append(len(batch[0]))
            model.calls += 1
            return F.cross_entropy(model(batch[0]), batch[1])

        result, _ = train(world, model, classes(32, torch.float32), step=step, **{**RUN, "check": check}, **options)
        runs.append((weights(model), result.history[0]["loss"], seen, model.calls, torch.get_rng_state()))
    return runs


@pytest.mark.parametrize("options", [{}, {"strategy": "shard"}, {"reproducible": True}, {"clip_norm": 0.1}])
def test_nothing_of_it_is_left(run_ranks, options):
    """Bits, attributes of the model, lists of the step and generators are those of a run without it."""
    for checked, unchecked in run_ranks(2, steps_with_and_without, options):
        assert_same_bits(*({"random": run[-1], **run[0]} for run in (checked, unchecked)))
        assert checked[1:4] == unchecked[1:4]


def test_what_stays_on_the_engines_is_noted():
    """A list of the notebook that the step appends to, and a number that it counts."""
    losses = []

    def step(model, batch):
        losses.append(1.0)
        return F.cross_entropy(model(batch[0]), batch[1])

    (note,) = alone(mlp(), step).notes
    assert note.startswith("the step changes losses beside weights and buffers: each rank has its own")


def test_a_step_that_cannot_be_run_twice_is_named():
    """It takes from an iterator."""
    batches = iter(range(100))

    def step(model, batch):
        next(batches)
        return F.cross_entropy(model(batch[0]), batch[1])

    sink = alone(mlp(), step)
    assert sink.checked == "not checked: the step can reach batches, an iterator, which cannot be put back"
    assert next(batches) == 3 * 2


def test_a_step_that_needs_a_whole_batch_is_named():
    """It fails on fewer samples, and trains."""
    sink = alone(mlp(), lambda model, batch: F.cross_entropy(model(batch[0].view(4, 6)), batch[1]))
    assert sink.checked.startswith("not checked: the step cannot be run on a few samples alone (RuntimeError: shape")


@contextlib.contextmanager
def in_context():
    yield


def test_a_context_that_decorates_is_no_iterator():
    """As a decorator, a context of a generator makes a new generator for each call; libraries decorate forwards so."""

    @in_context()
    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    assert alone(mlp(), step).checked.startswith("loss, ")


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(6, 16), nn.Linear(16, 3), nn.Dropout(0.5)

    def forward(self, x):
        hidden = checkpoint(lambda x: torch.tanh(self.first(self.drop(x))), x, use_reentrant=False)
        return self.last(hidden)


def test_dropout_in_a_forward_that_is_computed_again_is_named():
    """Activation checkpointing runs it in backward, where its dropout is not left out."""
    sink = alone(seeded(Recomputed, torch.float64))
    assert sink.checked.startswith("loss, ")
    assert sink.notes == ["slices were not compared with the whole batch: the step draws random numbers"]


def test_a_step_that_reaches_very_many_objects_is_named():
    """A data set in a closure, say, which would take longer to put back than to train on."""
    texts = [[[i]] for i in range(200_001)]

    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0 * len(texts)

    sink = alone(mlp(), step)
    assert sink.checked.startswith("not checked: the step can reach too many objects to put back, such as texts[")


def test_data_of_very_many_objects_are_named():
    """As the samples of a list."""
    x, y = classes(8)
    sink = alone(mlp(), data=Samples([x, y, [[[i]] for i in range(200_001)]]))
    assert sink.checked.startswith("not checked: the data holds too many objects to put back, such as data.")


class PartlyFloat32(nn.Module):
    """In float64, but for one layer, as rotary embeddings, norms and codebooks often are."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES)

    def forward(self, x):
        hidden = F.linear(x.float(), self.first.weight.float(), self.first.bias.float())
        return self.last(torch.tanh(hidden).to(x.dtype))


def test_a_part_in_lower_precision_is_no_reason_to_refuse(run_ranks):
    """Sums over other samples are rounded as that part is; a change of the weights' last bits does not show it."""
    for checked, _ in run_ranks(2, checked_of, PartlyFloat32):
        assert "as in one process" in checked


def checked_of(world, make):
    result, trained = train(world, seeded(make, torch.float64), classes(64), **RUN)
    return result.plan.checked, trained


def test_samples_whose_labels_are_all_ignored_are_not_all_there_is():
    """A slice of few may have none that counts, and no finite loss; the whole first batch has."""
    x, y = classes(32)
    y = torch.where(torch.arange(32) % 8 >= 6, y, -100)
    loss = functools.partial(F.cross_entropy, ignore_index=-100)
    sink = Kept()
    train(World(), mlp(), (x, y), sinks=[sink], loss=loss, **TWO_SLICES)
    assert sink.checked.startswith("loss, 4 gradients")
