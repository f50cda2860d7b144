"""What each_epoch and after_step change where the training does not see it is named, and not lost in silence."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import ADAMW, classes, mlp, train_task
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.task.task import Task
from nbdist.core.train import fit
from nbdist.errors import TaskError
from nbdist.plan import Plan
from nbdist.telemetry import ListSink, Noted

beta, config, rows = 0.0, {"beta": 0.0}, []
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*classes(16)), batch_size=8)


def step(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) * scaled()


def scaled():
    return 1 + beta + config["beta"]


def warms(model, row):
    global beta
    beta = float(row["epoch"])


def configures(model, row):
    config["beta"] = 1.0


def attributes(net, row):
    net.beta = 1.0


def keeps(model, row):
    global rows
    rows = [*rows, row]
    last = row["loss"]
    return last is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (warms, r"each_epoch=warms assigns beta, which the step reads: it is called on one rank.*current_step\(\)"),
        (configures, r"each_epoch=configures assigns config\['beta'\], which the step reads"),
        (attributes, r"each_epoch=attributes assigns net\.beta: it is called on one rank"),
    ],
)
def test_what_each_epoch_assigns_and_the_step_reads_is_refused(function, words):
    """Before an engine is touched."""
    with pytest.raises(TaskError, match=words):
        Task.create(mlp(), classes(8), step=step, each_epoch=function)


@pytest.mark.parametrize(("option", "form"), [("each_epoch", r"\(model, row\)"), ("after_step", r"\(model\)")])
def test_a_function_of_other_arguments_is_refused(option, form):
    """Not after an epoch."""

    def nothing():
        pass

    with pytest.raises(TaskError, match=f"{option}=nothing is called as {option}{form}, and takes other arguments"):
        Task.create(mlp(), classes(8), step=step, **{option: nothing})


def test_what_it_keeps_for_itself_is_its_own():
    """A history, say."""
    assert Task.create(mlp(), classes(8), step=step, each_epoch=keeps).each_epoch is keeps


def test_a_rate_that_each_epoch_sets_is_refused():
    """For an optimizer's settings there are schedulers."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def halves(model, row):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5

    with pytest.raises(TaskError, match=r"each_epoch=halves sets lr of an optimizer to 0\.05.*give lr_scheduler"):
        nbdist.train(model, classes(8), step=step, optimizer=optimizer, each_epoch=halves, verbose=False)


def reads_itself(model, batch):
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
    return loss


def plays(model, batch):
    return F.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.int64))


def test_a_loop_that_was_left_in_the_step_is_refused():
    """A step that needs no batch is none."""
    with pytest.raises(TaskError, match="the step reads loader itself, and not its batch"):
        Task.create(mlp(), loader, step=reads_itself)
    assert Task.create(mlp(), loader, step=plays).step is plays


class Average(nn.Module):
    """An average of the weights, as `torch.optim.swa_utils.AveragedModel` is one."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("weight", model[0].weight.detach().clone())
        self.calls = 0

    def update(self, model):
        self.weight.lerp_(model[0].weight.detach(), 0.5)

    def update_both(self, both):
        both["ema"].weight.lerp_(both["net"][0].weight.detach(), 0.5)

    def count(self, model):
        self.calls += 1


def run(world, function, both, sent):
    net = mlp()
    model = {"net": net, "ema": Average(net)} if both else net
    average = model["ema"] if both else Average(net)
    step = (lambda model, batch: F.cross_entropy(model["net"](batch[0]), batch[1])) if both else None
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    sink = ListSink()
    task = Task.create(
        model, classes(16), optimizer=optimizer, batch_size=8, after_step=getattr(average, function),
        **({"step": step} if both else {"loss": "cross_entropy"}),
    )  # fmt: skip
    fit(task, Plan.create(ranks=1, cores=1, **task.options), world, sinks=[sink], on_every_rank=not sent)
    return average, [event.text for event in sink.events if isinstance(event, Noted)]


def test_a_module_beside_the_model_would_stay_on_the_engines():
    """So it is refused where the task was sent there, and trained where it is a part of the model."""
    with pytest.raises(
        TaskError, match=r"update\(model\), called after each step, changes after_step.weight.*'ema': ema"
    ):
        run(World(), "update", False, True)
    average, notes = run(World(), "update", False, False)
    assert any("no snapshot or checkpoint has it" in note for note in notes)
    assert not torch.equal(average.weight, mlp()[0].weight)
    average, notes = run(World(), "update_both", True, True)
    assert not torch.equal(average.weight, mlp()[0].weight)
    assert notes == []


def test_a_counter_beside_the_model_is_noted():
    """It is right on the ranks, and nowhere else."""
    _, notes = run(World(), "count", False, True)
    assert any(note.startswith("count changes") and "beside weights and buffers" in note for note in notes)


def other_val(world):
    generator = torch.Generator().manual_seed(world.rank)
    val = torch.randn(8, 6, generator=generator), torch.zeros(8, dtype=torch.int64)
    task = Task.create(mlp(), classes(16), loss="cross_entropy", val=val, optimizer=ADAMW)
    train_task(world, task)


def test_validation_data_that_differ_from_rank_to_rank_are_named(run_ranks):
    """A mean over a mixture would be of no data at all."""
    with pytest.raises(TaskError, match=r"of val, rank 1 reads other samples than rank 0.*torch.manual_seed"):
        run_ranks(2, other_val)


def several(model, batch):
    first, second = (F.cross_entropy(part(batch[0]), batch[1]) for part in model)
    nbdist.update(first, 0)
    nbdist.update(second, 1)


def test_optimizers_may_be_a_list_and_named_by_number_or_by_themselves():
    """The same weights as with names."""
    models, trained = [(mlp(), mlp()) for _ in range(2)], []
    for pair in models:
        made = [torch.optim.SGD(part.parameters(), lr=0.1) for part in pair]

        def named(model, batch, made=made):
            for part, optimizer in zip(model, made, strict=True):
                nbdist.update(F.cross_entropy(part(batch[0]), batch[1]), optimizer)

        step = several if pair is models[0] else named
        nbdist.train(pair, classes(16), step=step, optimizer=made, verbose=False)
        trained.append(pair[1].state_dict())
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_a_script_beside_running_engines_is_warned(monkeypatch):
    """It trains in this process alone."""
    monkeypatch.setattr("nbdist.core.api.engines_beside", lambda: 2)
    with pytest.warns(UserWarning, match=r"in this process alone, beside 2 running engines.*cluster\.train"):
        nbdist.train(mlp(), classes(8), loss="cross_entropy")
