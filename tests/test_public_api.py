"""The public API: names, options, signatures. A change here is deliberate, and is in the changelog."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nbdist
from nbdist import errors
from nbdist.cluster.runs.run_spec import RUN_OPTIONS, RunOptions
from nbdist.notebook.parsers import TRAIN
from nbdist.plan.option import explained
from nbdist.plan.predict_options import PREDICT_OPTIONS, PredictOptions
from nbdist.plan.train_options import TRAIN_OPTIONS, TrainOptions

ROOT = Path(nbdist.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

PUBLIC = [
    "Cluster", "Mesh", "Plan", "Result", "Run", "carried", "compare", "current_cluster", "current_step", "gather",
    "last_run", "load_checkpoint", "past_runs", "predict", "rank", "train", "unshard", "update", "world_size",
]  # fmt: skip

TRAIN_ARGUMENTS = [
    "MODEL", "DATA", "--val", "--strategy", "--loss", "--reduction", "--optimizer", "--lr", "--lr-scheduler",
    "--schedule-by", "--epochs", "--steps",
    "--batch-size", "--accumulate", "--clip-norm", "--precision", "--sync-batchnorm", "--microbatches", "--schedule",
    "--split-at", "--tensor-plan", "--metric", "--evaluate", "--after-step", "--ema", "--each-epoch",
    "--keep-best", "--shuffle", "--seed", "--reproducible", "--threads",
    "--bucket-mib", "--gather", "--checkpoint", "--checkpoint-every", "--checkpoint-frozen", "--checkpoint-keep",
    "--resume", "--early-stop",
    "--stop-on-nan", "--check", "--rehearse", "--tensorboard", "--weights",
    "--background", "--hang-timeout", "--on-hang", "--on-failure", "-o",
]  # fmt: skip

MAGICS = [
    "dist",
    "dist_attach",
    "dist_clusters",
    "dist_compare",
    "dist_debug",
    "dist_export",
    "dist_help",
    "dist_predict",
    "dist_pull",
    "dist_push",
    "dist_run",
    "dist_runs",
    "dist_scale",
    "dist_start",
    "dist_status",
    "dist_stop",
    "dist_train",
    "dist_where",
]


def test_the_public_names():
    """These, sorted, and each is listed by dir()."""
    assert PUBLIC == nbdist.__all__ == sorted(nbdist.__all__)
    assert set(PUBLIC) <= set(dir(nbdist))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_says_what_it_is(name):
    """It is exported by its module, and has a docstring."""
    value = getattr(nbdist, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("nbdist.")
    assert name in importlib.import_module(nbdist._MODULES[name]).__all__


def test_a_name_that_is_not_there():
    """The error is Python's own."""
    with pytest.raises(AttributeError, match="module 'nbdist' has no attribute 'fit'"):
        nbdist.fit  # noqa: B018 - looking it up is the point


def test_there_is_a_version():
    """The installed package's."""
    assert nbdist.__version__[0].isdigit()


def test_the_options_of_dist_train():
    """Users' notebooks contain the names of options: they must not change by accident."""
    assert TRAIN_ARGUMENTS == [
        action.option_strings[-1] if action.option_strings else action.metavar for action in TRAIN._actions
    ]


def test_the_magics():
    """Their names, each with a help text."""
    from nbdist.notebook.magics import DistMagics

    registered = DistMagics.magics["line"] | DistMagics.magics["cell"]
    assert MAGICS == sorted(registered)
    for name, method in registered.items():
        assert inspect.getdoc(getattr(DistMagics, method) if isinstance(method, str) else method), name


@pytest.mark.parametrize(
    ("function", "options", "types"),
    [
        (nbdist.train, TRAIN_OPTIONS, TrainOptions),
        (nbdist.Cluster.train, TRAIN_OPTIONS | RUN_OPTIONS, RunOptions),
        (nbdist.Cluster.resume, TRAIN_OPTIONS | RUN_OPTIONS, RunOptions),
    ],
    ids=["nbdist.train", "Cluster.train", "Cluster.resume"],
)
def test_an_option_is_defined_once(function, options, types):
    """Signature and docstring show each, from one table; the types for checkers name the same ones."""
    parameters = inspect.signature(function).parameters
    assert [] == [name for name in options if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert inspect.Parameter.VAR_KEYWORD not in {parameter.kind for parameter in parameters.values()}
    assert [] == [name for name in options if parameters[name].default is not None]
    assert "\n    val: " in inspect.getdoc(function)
    shown = " ".join(inspect.getdoc(function).split())
    assert [] == [name for name, option in options.items() if f" {name}: {explained(option)}" not in shown]
    assert [] == [name for name in parameters if name != "self" and f" {name}: " not in shown]
    assert set(options) == set(types.__annotations__)


@pytest.mark.parametrize("function", [nbdist.predict, nbdist.Cluster.predict])
def test_the_options_of_a_prediction(function):
    """Those of a training that say how a forward is run, each explained."""
    parameters = inspect.signature(function).parameters
    assert set(PREDICT_OPTIONS) <= set(parameters)
    shown = " ".join(inspect.getdoc(function).split())
    assert [] == [name for name, option in PREDICT_OPTIONS.items() if f" {name}: {explained(option)}" not in shown]
    assert set(PREDICT_OPTIONS) == set(PredictOptions.__annotations__) < set(TRAIN_OPTIONS)


TYPED = """
import nbdist

def right(cluster: nbdist.Cluster) -> nbdist.Run:
    nbdist.train(object(), (1, 2), loss="mse", epochs=2, lr=None, device="cpu")
    return cluster.train(object(), (1, 2), steps=3, on_failure="shrink", background=True)

def wrong(cluster: nbdist.Cluster) -> None:
    nbdist.train(object(), (1, 2), epochs="2")
    cluster.train(object(), (1, 2), epoch=2)
    nbdist.train(object(), (1, 2), on_failure="shrink")
    cluster.resume(batch_size=2.5)
"""


@pytest.mark.programs
def test_a_type_checker_knows_every_option(tmp_path):
    """Wrong types and names are found before anything runs; right calls are right."""
    (tmp_path / "typed.py").write_text(TYPED)
    # Without the types of torch, which take three times as long to read as all others.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    options = ["--strict", "--no-incremental", "--cache-dir", tmp_path / "cache", "--follow-imports=silent"]
    options += ["--config-file", tmp_path / "mypy.ini"]
    command = [sys.executable, "-m", "mypy", *options, tmp_path / "typed.py"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent).stdout
    lines = [int(line.split(":")[1]) for line in printed.splitlines() if ": error: " in line]
    wrong = TYPED.split("\n").index("def wrong(cluster: nbdist.Cluster) -> None:") + 1
    assert [wrong + 1, wrong + 2, wrong + 3, wrong + 4] == lines, printed


def test_the_tree_of_errors():
    """Each error is an NbdistError and the builtin that fits; the drawing in the docstring names them all."""
    tree = {
        "ClusterError": RuntimeError, "EngineError": errors.ClusterError, "PeerLostError": RuntimeError,
        "PlanError": ValueError, "TaskError": TypeError,
    }  # fmt: skip
    defined = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert {"NbdistError", *tree} == defined
    for name, parent in tree.items():
        assert issubclass(getattr(errors, name), errors.NbdistError)
        assert issubclass(getattr(errors, name), parent)
        assert name in errors.__doc__


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_stays_short(path):
    """Every file begins with a docstring, is below 400 lines, and its __all__ is sorted and true."""
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    assert source.count("\n") < 400
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert sorted(names) == sorted(set(names))
            bound = {name for n in tree.body for name in _bound(n)}
            assert set(names) <= bound | set(PUBLIC)


def _bound(node):
    """The names that a statement at the top of a module binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.If):
        return [name for child in node.body for name in _bound(child)]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []
