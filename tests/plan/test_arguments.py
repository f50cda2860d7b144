"""Options of magics and the command line: the same table as the Plan's."""

from __future__ import annotations

import pytest

from nbdist.errors import PlanError
from nbdist.plan.arguments import OptionParser, add_options, given_options, line_help, split_line
from nbdist.plan.option import flag
from nbdist.plan.plan import OPTIONS, Plan


def parser():
    made = OptionParser("%train", "Train.")
    made.add_argument("model")
    add_options(made, OPTIONS)
    return made


WORDS = {
    "strategy": ("dp=2", "dp=2"), "loss": ("mse", "mse"), "optimizer": ("sgd", "sgd"), "lr": ("1e-3", 0.001),
    "epochs": ("3", 3), "steps": ("7", 7), "batch_size": ("64", 64), "accumulate": ("2", 2), "clip_norm": ("1", 1.0),
    "metric": ("mae", "mae"), "shuffle": ("no", False), "seed": ("-5", -5), "threads": ("2", 2),
    "bucket_mib": ("0.5", 0.5), "lr_scheduler": ("warm", "warm"), "precision": ("bf16", "bf16"),
    "sync_batchnorm": ("yes", True), "reproducible": ("8", 8), "microbatches": ("4", 4), "schedule": ("gpipe", "gpipe"),
    "split_at": ("blocks.2", ("blocks.2",)), "tensor_plan": ("rules", "rules"), "gather": ("no", False),
    "checkpoint": ("/tmp/here", "/tmp/here"), "checkpoint_every": ("5min", "5min"), "checkpoint_keep": ("2", 2),
    "checkpoint_frozen": ("no", False),
    "resume": ("/tmp/here", "/tmp/here"), "stop_on_nan": ("yes", True), "rehearse": ("yes", True),
    "tensorboard": ("/tmp/here", "/tmp/here"),
    "schedule_by": ("epoch", "epoch"), "check": ("no", "no"), "reduction": ("sum", "sum"),
    "evaluate": ("judge", "judge"), "early_stop": ("val_loss:3", "val_loss:3"),
    "after_step": ("clamp", "clamp"), "each_epoch": ("show", "show"), "ema": ("0.999", 0.999),
    "keep_best": ("val_loss", "val_loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_can_be_given(name):
    """As ``--name value``; an option that is not given is absent; the Plan accepts the value."""
    word, value = WORDS[name]
    given = given_options(parser().parse(["net", "--" + name.replace("_", "-"), word]), OPTIONS)
    assert {name: value if name != "split_at" else [*value]} == given
    if name == "tensor_plan":  # a magic evaluates it
        given["tensor_plan"] = value = {"*.up": "column"}
    mesh = {"microbatches": "pp", "split_at": "pp", "tensor_plan": "tp"}.get(name)
    options = given | ({} if mesh is None else {"strategy": mesh})
    needed = {"checkpoint_every": {"checkpoint": "/tmp/here"}, "schedule_by": {"lr_scheduler": "warm"}}
    options |= needed.get(name, {})
    assert value == getattr(Plan.create(ranks=2, cores=2, **options), name)


def test_the_help_shows_every_option():
    """With its sentence, its placeholder and its default; other options are written as on a line."""
    text = " ".join(parser().format_help().split())
    for name, option in OPTIONS.items():
        more = f" [{option.metavar} ...]" if option.many else ""
        word = "yes|no" if option.parse is bool else option.metavar
        metavar = f"[{word}]" if option.bare else word
        assert f"{flag(name)} {metavar}{more} {line_help(option)}" in text
    assert "Read the training data in a new order each epoch. Default: yes." in text
    assert "Optimizer steps, instead of --epochs; wraps round the data." in text
    assert "Passes over the training data. Default: 1, unless --steps." in text
    assert "`" not in text


@pytest.mark.parametrize("line", ["net --resume", "net --resume --epochs 3", "--resume --epochs 3 net"])
def test_an_option_that_may_stand_alone(line):
    """It means yes then; with a word, the word."""
    assert given_options(parser().parse(split_line(line)), OPTIONS)["resume"] is True
    assert "here" == given_options(parser().parse(split_line("net --resume here")), OPTIONS)["resume"]


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("True", True), ("1", True), ("no", False), ("FALSE", False), ("0", False)]
)
def test_yes_and_no(word, value):
    """A switch takes yes or no."""
    assert value is parser().parse(["net", "--shuffle", word]).shuffle


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("net --learning-rate=3", r"%train: unknown argument '--learning-rate'\. Did you mean '--lr'\?"),
        ("net --epoch 3", r"%train: unknown argument '--epoch'\. Did you mean '--epochs'\?"),
        ("net --batchsize 3", r"unknown argument '--batchsize'\. Did you mean '--batch-size'\?"),
        ("net other", r"%train: unknown argument 'other'\."),
        ("net --epochs", "%train: argument --epochs: expected one argument"),
        ("net --epochs many", "%train: argument --epochs: invalid int value: 'many'"),
        ("net --shuffle maybe", "%train: argument --shuffle: 'maybe' is neither yes nor no"),
        ("", "%train: the following arguments are required: model"),
    ],
)
def test_a_mistake_is_a_plan_error(line, message):
    """Never an exit, and the error for an unknown option suggests the nearest known one."""
    with pytest.raises(PlanError, match=message):
        parser().parse(split_line(line))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  model   data ", ["model", "data"]),
        ("model (X, y) --loss mse", ["model", "(X, y)", "--loss", "mse"]),
        ("m f(a, [1, 2])[0] {'k': (1, 2)}", ["m", "f(a, [1, 2])[0]", "{'k': (1, 2)}"]),
        ("m d['a b'] \"x y\"", ["m", "d['a b']", '"x y"']),
        ("m f(')', \"it's\") -o r", ["m", "f(')', \"it's\")", "-o", "r"]),
    ],
)
def test_a_line_is_split_as_python_reads_it(line, words):
    """Brackets and quotes keep their content together, and stay."""
    assert words == split_line(line)


@pytest.mark.parametrize(
    ("line", "missing"), [("m (X, y", r"'\)'"), ("m f([1, 2)", "']'"), ("m 'data", '"\'"'), ('m f("x)', "'\"'")]
)
def test_what_is_not_closed_is_named(line, missing):
    """The error says which bracket or quote is missing, and where."""
    with pytest.raises(PlanError, match=f"{missing} is missing in: m "):
        split_line(line)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--epochs 3", {"epochs": 3}),
        ("--epochs n", {"epochs": 4}),
        ("--epochs n*2 --lr 1/100 --shuffle yes", {"epochs": 8, "lr": 0.01, "shuffle": True}),
        ("--lr n --shuffle n>5 --seed -5", {"lr": 4.0, "shuffle": False, "seed": -5}),
        ("--reproducible n --seed whole", {"reproducible": 4, "seed": 7}),
    ],
)
def test_a_number_may_be_an_expression(line, value):
    """In a notebook; the value is of the option's type."""
    made = OptionParser("%train", "Train.", expressions=True)
    add_options(made, OPTIONS)
    names = {"n": 4, "whole": type("Whole", (), {"__index__": lambda self: 7})()}
    assert value == given_options(made.parse(split_line(line), lambda text: eval(text, {}, names)), OPTIONS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs yes_", "--epochs yes_ is True, not a whole number"),
        ("--lr yes_", "--lr yes_ is True, not a number"),
        ("--shuffle odd", r"--shuffle odd is .*, neither yes nor no"),
        ("--epochs 1/3", r"--epochs 1/3 is 0\.3.*, not a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(line, message):
    """With the option, the expression and its value; None is as good as not given."""
    made = OptionParser("%train", "Train.", expressions=True)
    add_options(made, OPTIONS)
    names = {"yes_": True, "odd": type("Odd", (), {"__eq__": lambda self, other: 1 / 0, "__hash__": None})()}
    with pytest.raises(PlanError, match=message):
        made.parse(split_line(line), lambda text: eval(text, {}, names))
    assert {} == given_options(made.parse(["--lr", "None"], eval), OPTIONS)
