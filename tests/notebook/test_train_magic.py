"""``%dist_train`` and ``%%dist_train`` through a real shell."""

from __future__ import annotations

import os
import signal
import types

import pytest
import torch
from shared_cluster import until
from torch import nn

import nbdist
from nbdist.errors import EngineError, NbdistError, PlanError, TaskError
from nbdist.notebook.dashboard import LineDashboard
from nbdist.notebook.parsers import LINE_OPTIONS
from nbdist.plan.arguments import line_help
from nbdist.plan.option import flag
from nbdist.plan.plan import OPTIONS


def weights(notebook, name="model"):
    return {key: tensor.clone() for key, tensor in notebook.names[name].state_dict().items()}


def test_one_line_trains_the_notebooks_own_model(notebook):
    """It returns the Run, prints a line an epoch and a summary, and the same object holds the trained weights."""
    model, before = notebook.names["model"], weights(notebook)
    notebook.printed()
    run = notebook(
        "%dist_train model train_set --loss cross_entropy --optimizer adamw --lr 1e-2 --epochs 2 --batch-size 16 "
        "--val test_set --metric accuracy"
    )
    shown = notebook.printed().splitlines()
    assert isinstance(run, nbdist.Run)
    assert notebook.names["model"] is model
    assert not torch.equal(before["body.weight"], model.body.weight)
    assert [line.split()[:3] for line in shown[:2]] == [["nbdist:", "epoch", "1"], ["nbdist:", "epoch", "2"]]
    assert "val_loss" in shown[0]
    assert "val_accuracy" in shown[0]
    assert shown[2].startswith("nbdist: Net (21 parameters) on dp=2 · finished · step 8/8 · loss ")
    assert run.history[-1]["val_loss"] > 0
    with torch.no_grad():
        hits = (model(notebook.names["X"][:10]).argmax(1) == notebook.names["y"][:10]).double().mean().item()
    assert run.history[-1]["val_accuracy"] == pytest.approx(hits)


def test_numbers_and_words_are_expressions_of_the_notebook(notebook):
    """Read when the line runs: so a loop can train with each value of a list."""
    notebook.names.update(config=types.SimpleNamespace(epochs=2, mesh="dp=2"), rates=[0.5, 0.25])
    notebook(
        "runs = {}\n"
        "for rate in rates:\n"
        "    runs[rate] = %dist_train Net() train_set --loss cross_entropy --optimizer sgd --lr rate/2 "
        "--epochs config.epochs --strategy config.mesh --batch-size 4*4 --background\n"
        "for run in runs.values():\n"
        "    run.wait()"
    )
    plans = {rate: run.plan for rate, run in notebook.names["runs"].items()}
    assert {0.5: 0.25, 0.25: 0.125} == {rate: plan.lr for rate, plan in plans.items()}
    assert {(2, "dp=2", 16)} == {(plan.epochs, plan.strategy, plan.batch_size) for plan in plans.values()}


def test_every_option_reaches_the_plan(notebook, tmp_path):
    """As a user writes it, by its own name; a path takes names of the notebook in braces."""
    notebook.names.update(folder=tmp_path, deep=nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)))
    run = notebook(
        "%dist_train deep train_set --loss cross_entropy --optimizer sgd --lr 0.1 --steps 3 --batch-size 16 "
        "--accumulate 2 --clip-norm 0.5 --seed 7 --threads 1 --strategy dp=2 --shuffle no --bucket-mib 8 "
        "--val test_set --metric accuracy --lr-scheduler 'lambda o: torch.optim.lr_scheduler.StepLR(o, 1)' "
        "--schedule-by epoch --precision bf16 --sync-batchnorm no --reduction mean "
        "--checkpoint {folder}/kept --checkpoint-every 2 --checkpoint-keep 1 --stop-on-nan yes --check mesh"
    )
    assert [*(tmp_path / "kept").glob("*-step00000003*/checkpoint.json")]
    pipelined = notebook(
        "%dist_train deep train_set --loss cross_entropy --optimizer sgd --lr 0.1 --steps 4 --batch-size 16 "
        "--seed 7 --shuffle no --strategy pp --split-at 1 --microbatches 2 --schedule gpipe --gather no "
        "--resume {folder}/kept"
    ).plan
    reported = (pipelined.split_at, pipelined.microbatches, pipelined.schedule, pipelined.resume, pipelined.gather)
    assert reported == (("1",), 2, "gpipe", str(tmp_path / "kept"), False)
    plan = {
        name: value
        for name, value in run.plan.to_dict().items()
        if name not in ("mesh", "checked", "updates", "carries")
    }
    assert plan == {
        "loss": "cross_entropy", "reduction": "mean", "optimizer": "sgd", "lr": 0.1, "steps": 3, "epochs": None,
        "batch_size": 16, "schedule_by": "epoch",
        "accumulate": 2, "clip_norm": 0.5, "seed": 7, "threads": 1, "strategy": "dp=2", "shuffle": False,
        "bucket_mib": 8.0, "metric": "accuracy", "lr_scheduler": "<lambda>", "precision": "bf16",
        "sync_batchnorm": False, "reproducible": 0, "microbatches": None, "schedule": "1f1b", "split_at": (),
        "tensor_plan": None, "evaluate": "", "early_stop": "", "after_step": "", "each_epoch": "", "ema": None,
        "keep_best": "",
        "gather": True, "checkpoint": str(tmp_path / "kept"), "checkpoint_every": "2", "checkpoint_keep": 1,
        "resume": "", "stop_on_nan": True, "rehearse": False, "checkpoint_frozen": True, "tensorboard": "",
        "check": "mesh",
    }  # fmt: skip
    assert set(plan) == {*OPTIONS}
    assert run.plan.checked.startswith("loss, ")


@pytest.mark.parametrize("word", ["data", "ddp", "dp=2"])
def test_a_strategy_has_its_words(notebook, word):
    """All three give the same mesh here."""
    run = notebook(f"%dist_train model train_set --loss cross_entropy --steps 1 --strategy {word}")
    assert str(run.plan.mesh) == "dp=2"


def test_the_run_can_be_kept_in_three_ways(notebook):
    """As the value of the line, under the name behind -o, and as the newest run."""
    notebook("run = %dist_train model train_set --loss cross_entropy --steps 1 -o kept")
    assert notebook.names["run"] is notebook.names["kept"] is nbdist.last_run()


def test_expressions_may_hold_spaces_in_brackets(notebook):
    """For the model, the data, the validation data, the loss and the optimizer."""
    run = notebook(
        "%dist_train [model, None][0] (X, y) --loss (lambda out, target: F.cross_entropy(out, target)) --steps 2 "
        "--optimizer (lambda parameters: torch.optim.SGD(parameters, lr=0.1)) --val (X[:8], y[:8])"
    )
    assert run.history[0]["steps"] == 2
    assert "val_loss" in run.history[0]
    run = notebook("%dist_train model train_set --loss nn.CrossEntropyLoss(label_smoothing=0.1) --steps 1")
    assert run.plan.loss == "CrossEntropyLoss"


def test_names_are_callables_of_the_notebook(notebook):
    """Loss, optimizer and metric; a callable of the notebook wins over a well-known name, another value does not."""
    notebook(
        "def mse(output, target):\n    return F.cross_entropy(output, target) * 0 + 0.25 + 0 * output.sum()",
        "def slow(parameters, lr):\n    return torch.optim.SGD(parameters, lr=lr)",
        "def always(output, target):\n    return torch.tensor(0.75), len(target)",
        "accuracy = 0.5",
        "run = %dist_train model train_set --loss mse --optimizer slow --lr 1 --steps 1 --val test_set --metric always",
        "other = %dist_train model train_set --loss cross_entropy --steps 1 --val test_set --metric accuracy",
    )
    run = notebook.names["run"]
    assert run.history[0]["loss"] == pytest.approx(0.25)
    assert run.history[0]["val_always"] == pytest.approx(0.75)
    assert (run.plan.loss, run.plan.optimizer, run.plan.metric) == ("mse", "slow", "always")
    assert "val_accuracy" in notebook.names["other"].history[0]


def test_a_ready_optimizer_gets_its_state_back(notebook):
    """By its name in the notebook."""
    notebook(
        "mine = torch.optim.AdamW(model.parameters(), lr=0.01)",
        "%dist_train model train_set --loss cross_entropy --optimizer mine --steps 3",
    )
    assert [state["step"].item() for state in notebook.names["mine"].state.values()] == [3.0, 3.0]


def test_a_background_run_returns_at_once_and_stops_when_asked(notebook):
    """The magic returns the running Run; the next run is queued; the stop loads the weights."""
    before = weights(notebook)
    endless = "= %dist_train model train_set --loss cross_entropy --steps 1000000000 --background"
    run, second = notebook(f"run {endless}", f"second {endless}", "(run, second)")
    assert (run.state, second.state) == ("running", "queued")
    until(lambda: run.progress.step > 3)
    error, _ = notebook.fails("%dist_start -n 1")
    assert "stop it (run.stop()) before the engines change" in str(error)
    notebook("second.stop()", "run.stop()", "run.wait()")
    assert (run.state, second.state) == ("stopped", "stopped")
    assert not torch.equal(before["body.weight"], notebook.names["model"].body.weight)


def test_what_the_users_code_prints_is_shown_by_rank(notebook):
    """Once, if all ranks print the same."""
    notebook("def loud(output, target):\n    print('in the loss')\n    return F.cross_entropy(output, target)")
    notebook.printed()
    notebook("%dist_train model train_set --loss loud --steps 2")
    assert notebook.printed().count("[0-1] in the loss\n") == 2


def test_the_cell_form_is_one_training_step(notebook):
    """It sees the model, the batch and the notebook, and equals the line form of the same loss, bit for bit."""
    notebook(
        "import copy\nm2, scale = copy.deepcopy(model), 1.0",
        "%dist_train model train_set --loss cross_entropy --epochs 2 --batch-size 16",
        "%%dist_train m2 train_set --epochs 2 --batch-size 16\nx, target = batch\n"
        "loss = F.cross_entropy(model(x), target) * scale",
    )
    assert all(torch.equal(tensor, weights(notebook, "m2")[name]) for name, tensor in weights(notebook).items())
    assert "loss" not in notebook.names
    assert "target" not in notebook.names


def test_the_notebooks_own_name_of_the_model_is_the_same_object(notebook):
    """`m2` and `model` are one object inside the step, and `m2` is trained here."""
    notebook("m2 = Net()", "was = model")
    before = weights(notebook, "m2")
    notebook("%%dist_train m2 train_set --steps 2\nx, t = batch\nassert m2 is model\nloss = F.cross_entropy(m2(x), t)")
    assert not torch.equal(before["body.weight"], notebook.names["m2"].body.weight)
    assert notebook.names["model"] is notebook.names["was"]


def test_a_weight_says_what_the_mean_is_over(notebook):
    """Ignored targets average exactly: the losses of both forms are equal, and differ from the plain mean."""
    notebook(
        "t = torch.randint(3, (64,)); t[::3] = -100; t[:16] = -100",
        "a = %dist_train model (X, t) --loss cross_entropy --lr 1e-9 --epochs 1 --batch-size 32",
        "%%dist_train model (X, t) --lr 1e-9 --epochs 1 --batch-size 32 -o b\n"
        "x, target = batch\nloss = F.cross_entropy(model(x), target).nan_to_num()\nweight = (target != -100).sum()",
        "%%dist_train model (X, t) --lr 1e-9 --epochs 1 --batch-size 32 -o c\n"
        "x, target = batch\nloss = F.cross_entropy(model(x), target).nan_to_num()",
        "exact = F.cross_entropy(model(X), t).item()",
    )
    names = notebook.names
    losses = [names[name].history[0]["loss"] for name in "abc"]
    assert losses[:2] == pytest.approx([names["exact"]] * 2, rel=1e-5)
    assert losses[2] != pytest.approx(names["exact"], rel=1e-4)


def test_a_step_may_log_numbers(notebook):
    """A dict that the cell assigns is in the history, and an evaluation of one's own beside it."""
    notebook(
        "def judge(model, batch):\n    return {'right': (model(batch[0]).argmax(1) == batch[1]).float().mean()}",
        "%%dist_train model train_set --lr 1e-9 --optimizer sgd --val test_set --evaluate judge -o run\n"
        "x, target = batch\noutput = model(x)\nloss = F.cross_entropy(output, target)\n"
        "log = {'right': (output.argmax(1) == target).float().mean()}",
    )
    row = notebook.names["run"].history[0]
    model, names = notebook.names["model"], notebook.names
    for name, data in (("right", names["train_set"]), ("val_right", names["test_set"])):
        x, target = data.tensors
        assert (model(x).argmax(1) == target).float().mean().item() == pytest.approx(row[name])
    assert "right" in names["run"].to_frame().columns
    assert "log" not in names


def test_log_may_be_something_else_in_a_cell(notebook):
    """What is imported under that name is no log; another value is refused in a sentence."""
    notebook(
        "%%dist_train model train_set --steps 1\nfrom math import log\nx, target = batch\n"
        "loss = F.cross_entropy(model(x), target) * log(3.0)"
    )
    with pytest.raises(TaskError, match="the step's log is a value of type Tensor: log is a dict of numbers by name"):
        notebook("%%dist_train model train_set --steps 1\nlog = model(batch[0])\nloss = F.cross_entropy(log, batch[1])")


def test_an_error_in_the_step_is_shown_with_its_cell_and_line(notebook):
    """The rank, the line of the cell as the user sees it, and its source; the model is unchanged."""
    before = weights(notebook)
    number = notebook.shell.execution_count
    error, shown = notebook.fails(
        "%%dist_train model train_set --steps 3\nx, target = batch\n\nloss = F.cross_entropy(modle(x), target)"
    )
    assert type(error) is EngineError
    assert str(error) == f"ranks 0-1: NameError: name 'modle' is not defined (Cell In[{number}], line 4)"
    assert "---->   4 loss = F.cross_entropy(modle(x), target)" in shown
    assert "nbdist/" not in shown
    assert shown.count("NameError") == 2, "once in the engine's traceback, once in the sentence"
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(notebook).items())
    assert notebook("%dist_train model train_set --loss cross_entropy --steps 1").state == "finished"


def test_an_error_in_a_function_of_another_cell_names_that_cell(notebook):
    """Functions keep their line numbers, for any caller."""
    number = notebook.shell.execution_count
    notebook("def torn(output, target):\n    raise ValueError('torn')")
    error, shown = notebook.fails("%dist_train model train_set --loss torn --steps 1")
    assert str(error) == f"ranks 0-1: ValueError: torn (Cell In[{number}], line 2)"
    assert "---->   2     raise ValueError('torn')" in shown


CELL = (
    "the cell body is one training step: it sees `model` and `batch`, and assigns `loss`, or calls nbdist.update for "
    "each of several."
)
MISTAKES = [
    ("%dist_train modle train_set --loss mse", TaskError,
     "'modle' is not defined in the notebook. Did you mean 'model'?"),
    ("%dist_train model tain_set --loss mse", TaskError,
     "'tain_set' is not defined in the notebook. Did you mean 'train_set'?"),
    ("%dist_train model train_set --loss mse --val tst", TaskError, "'tst' is not defined in the notebook."),
    ("%dist_train model train_set", TaskError, "no loss: name one (--loss mse, or loss='mse')"),
    ("%dist_train model", PlanError, "%dist_train: the following arguments are required: DATA."),
    ("%dist_train", PlanError, "%dist_train: the following arguments are required: MODEL, DATA."),
    ("%dist_train model train_set test_set --loss mse", PlanError, "%dist_train: unknown argument 'test_set'."),
    ("%dist_train model train_set --los mse", PlanError,
     "%dist_train: unknown argument '--los'. Did you mean '--loss'?"),
    ("%dist_train model train_set --loss croos_entropy", TaskError, "unknown loss 'croos_entropy': use "),
    ("%dist_train model train_set --loss 3", TaskError, "loss must be a name or a callable, not 3."),
    ("%dist_train model train_set --loss nn.MSELoss", TaskError, "loss MSELoss is a class, not a loss: write MSE"),
    ("%dist_train model train_set --loss mse --optimizer adamm", TaskError, "unknown optimizer 'adamm': use "),
    ("%dist_train model train_set --loss mse --val test_set --metric acuracy", TaskError, "unknown metric 'acuracy'"),
    ("%dist_train model train_set --loss mse --metric accuracy", TaskError,
     "metric accuracy has no data to be measured on: give val"),
    ("%dist_train model train_set --loss mse --strategy fsdpp", PlanError, "unknown strategy 'fsdpp': use data"),
    ("%dist_train model train_set --loss mse --strategy dp=4", PlanError, "strategy 'dp=4' needs 4 ranks"),
    ("%dist_train model train_set --loss mse --batch-size 1", PlanError, "batch_size 1 is smaller than its 2 slices"),
    ("%dist_train model train_set --loss mse --batch-size big", TaskError,
     "--batch-size: 'big' is not defined in the notebook."),
    ("%dist_train model train_set --loss mse --epochs 1/2", PlanError, "--epochs 1/2 is 0.5, not a whole number."),
    ("%dist_train model train_set --loss mse --epochs 2.0", PlanError, "--epochs 2.0 is not a whole number."),
    ("%dist_train model train_set --loss mse --lr 0", PlanError, "lr 0.0 must be a positive number."),
    ("%dist_train model train_set --loss mse --epochs 1 --steps 1", PlanError, "epochs=1 and steps=1: give one of"),
    ("%dist_train model train_set --loss mse --shuffle maybe", PlanError,
     "--shuffle maybe is neither yes nor no."),
    ("%dist_train model (X, y --loss mse", PlanError, "')' is missing in: model (X, y --loss mse"),
    ("%dist_train model X+ --loss mse", PlanError, "'X+' is not a Python expression."),
    ("%dist_train model X[9,9,9] --loss mse", TaskError, "X[9,9,9] cannot be evaluated: IndexError: "),
    ("%dist_train Net train_set --loss mse", TaskError, "Net is a class, not a model: write Net()."),
    ("%dist_train nn.ReLU() train_set --loss mse", TaskError, "nn.ReLU() has no parameters to train."),
    ("%dist_train model 5 --loss mse", TaskError, "5 is a value of type int, not data: give a Dataset"),
    ("%dist_train model X --loss mes", TaskError, "unknown loss 'mes': use bce, cross_entropy"),
    ("%dist_train model X --loss mse", TaskError, "loss compares the model's output with the last element of a batch"),
    ("%dist_train model (X,y[:3]) --loss mse", TaskError,
     "the tensors of (X,y[:3]) differ in their number of samples, [64, 3]: make them equal."),
    ("%%dist_train model train_set --loss mse\nloss = 1", PlanError, "--loss and a cell body both define the loss"),
    ("%%dist_train model train_set\nx = 1", PlanError, f"the cell does not assign `loss`: {CELL}"),
    ("%%dist_train model train_set\n# nothing", PlanError, f"the cell is empty: {CELL}"),
    ("%%dist_train model train_set\nx = 1\nloss = (", PlanError, f"'(' was never closed (line 3 of the cell): {CELL}"),
    ("%%dist_train model train_set\nloss = 1\nreturn loss", PlanError,
     f"'return' outside function (line 3 of the cell): {CELL}"),
    ("%%dist_train model train_set\nloss = 1\nfrom math import *", PlanError,
     f"import * only allowed at module level (line 3 of the cell): {CELL}"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "kind", "message"), MISTAKES, ids=[case[0][12:60] for case in MISTAKES])
def test_mistakes_are_reported_in_one_sentence(notebook, line, kind, message):
    """One error that names the value and the cure, shown without a traceback, and no run begins."""
    before = nbdist.last_run()
    error, shown = notebook.fails(line)
    assert isinstance(error, NbdistError)
    assert isinstance(error, kind)
    assert str(error).startswith(message)
    assert shown.strip() == f"{type(error).__name__}: {error}"
    assert nbdist.last_run() is before


def test_the_help_explains_every_option_once(notebook):
    """With its placeholder, its sentence and its default."""
    help_text = notebook.shell.find_line_magic("dist_train").__doc__
    assert notebook.shell.find_cell_magic("dist_train").__doc__ == help_text
    flat = " ".join(help_text.split())
    for name, option in LINE_OPTIONS.items():
        more = f" [{option.metavar} ...]" if option.many else ""
        word = "yes|no" if option.parse is bool else option.metavar
        metavar = f"[{word}]" if option.bare else word
        assert flat.count(f"{flag(name)} {metavar}{more} {line_help(option)}") == 1, name
    for part in ("usage: %dist_train", "MODEL", "DATA", "--val DATA", "--background", "-o NAME"):
        assert part in flat
    assert max(map(len, help_text.splitlines())) <= 100


def test_a_cell_that_adds_to_a_name_of_the_notebook(notebook):
    """The line that most loops have, and a run's history makes needless."""
    notebook.names["total"] = 0.0
    with pytest.raises(PlanError, match=r"line 3 of the cell adds to total of the notebook.*run\.history has the mean"):
        notebook("%%dist_train model train_set\nloss = model(batch[0]).mean()\ntotal += loss.item()")


def test_a_cell_knows_nbdist(notebook):
    """Without an import."""
    notebook.names.pop("nbdist", None)
    run = notebook(
        "%%dist_train model train_set --steps 2\nloss = model(batch[0]).mean() * (1 + nbdist.current_step())"
    )
    assert "finished" == run.state


def test_a_redefined_class_is_the_one_that_trains(notebook):
    """After an edit, instances of the new class run the new code on the engines."""
    edited = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    edited += "        self.body = nn.Linear(6, 3)\n\n    def forward(self, x):\n        print('version {}')\n"
    edited += "        return self.body(x)\n\nmodel = Net()"
    for version in (1, 2):
        notebook(edited.replace("{}", str(version)))
        run = notebook("%dist_train model train_set --loss cross_entropy --steps 1")
        assert set("".join(run.printed().values()).splitlines()) == {f"version {version}"}


def test_closures_and_notebook_globals_travel(notebook):
    """A loss made by a function, over a notebook value as of the call."""
    notebook(
        "factor = 2.0",
        "def scaled(by):\n    def loss(output, target):\n"
        "        return F.cross_entropy(output, target) * by * factor\n    return loss",
        "plain = %dist_train model train_set --loss cross_entropy --lr 1e-9 --steps 1",
        "six = %dist_train model train_set --loss scaled(3) --lr 1e-9 --steps 1",
        "factor = 1.0",
        "three = %dist_train model train_set --loss scaled(3) --lr 1e-9 --steps 1",
    )
    losses = [notebook.names[name].history[0]["loss"] for name in ("plain", "six", "three")]
    assert losses == pytest.approx([losses[0], losses[0] * 6, losses[0] * 3])


def test_an_interrupt_that_comes_while_the_panel_is_drawn_stops_the_run(notebook, monkeypatch):
    """As a later one does: the cell fails, and the run has ended."""
    begin = LineDashboard.begin

    def interrupted(dashboard, run):
        os.kill(os.getpid(), signal.SIGINT)
        begin(dashboard, run)

    monkeypatch.setattr(LineDashboard, "begin", interrupted)
    error, _ = notebook.fails("%dist_train model train_set --loss cross_entropy --steps 1000000000")
    assert isinstance(error, KeyboardInterrupt)
    assert nbdist.last_run().state == "stopped"


def test_engines_run_what_autoreload_has_patched(notebook, tmp_path, monkeypatch):
    """Without a reload in the notebook, and where a cell on the engines has imported the function by its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    path, clock = tmp_path / "patched_text.py", iter(range(2_000_000_000, 2_000_000_100))

    def write(number):
        path.write_text(f"def number():\n    return {number}\n")
        os.utime(path, (now := next(clock), now))

    write(1)
    notebook("%load_ext autoreload", "%autoreload 2", "import patched_text", "%%dist\nfrom patched_text import number")
    write(2)
    notebook.printed()
    notebook("%%dist\nprint(number())")
    assert ("2", 2) == (notebook.printed().split()[-1], notebook("patched_text.number()"))
    run = notebook(
        "%%dist_train model train_set --epochs 1 --check no --batch-size 60\n"
        "loss = model(batch[0]).sum() * 0 + patched_text.number()"
    )
    assert 2.0 == run.history[0]["loss"]
    notebook("%autoreload 0")


@pytest.mark.parametrize(
    ("body", "name", "line"),
    [
        ("scale = scale * 2\nloss = model(batch[0]).mean() * scale", "scale", 2),
    ],
)
def test_a_cell_that_assigns_a_name_after_it_has_read_it(notebook, body, name, line):
    """To Python it is local, and has no value there."""
    notebook("scale = 1.0")
    error, _ = notebook.fails(f"%%dist_train model train_set --epochs 1\n{body}")
    assert isinstance(error, PlanError)
    assert (
        f"the cell assigns {name}, so {name} is a local name of the step, and line {line} of the cell reads it"
        in str(error)
    )


def test_a_cell_may_assign_a_name_of_the_notebook(notebook):
    """Before it reads it, or in what a comprehension has for itself."""
    notebook("x = y = loss = 1.0")
    notebook(
        "%%dist_train model train_set --epochs 1\nx, y = batch\n"
        "loss = torch.stack([y for y in [model(x).mean()]]).mean()"
    )
