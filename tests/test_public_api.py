"""The public API: names, options, signatures. A change here is deliberate, and is in the changelog."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import nbdist
from nbdist import errors
from nbdist.plan.plan import OPTIONS, Plan

ROOT = Path(nbdist.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

PUBLIC = [
    "Cluster", "Mesh", "Plan", "Result", "Run", "current_cluster", "gather", "last_run", "load_checkpoint",
    "past_runs", "train",
]  # fmt: skip

TRAIN_OPTIONS = [
    "MODEL", "DATA", "--val", "--strategy", "--loss", "--optimizer", "--lr", "--lr-scheduler", "--epochs", "--steps",
    "--batch-size", "--accumulate", "--clip-norm", "--precision", "--sync-batchnorm", "--microbatches", "--schedule",
    "--split-at", "--tensor-plan", "--metric", "--shuffle", "--seed", "--reproducible", "--threads", "--bucket-mib",
    "--gather", "--checkpoint", "--checkpoint-every", "--checkpoint-keep", "--resume", "--stop-on-nan", "--tensorboard",
    "--background", "--hang-timeout", "--on-hang", "--on-failure", "-o",
]  # fmt: skip

MAGICS = [
    "dist",
    "dist_attach",
    "dist_clusters",
    "dist_debug",
    "dist_help",
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
    from nbdist.notebook.parsers import TRAIN

    assert TRAIN_OPTIONS == [
        action.option_strings[-1] if action.option_strings else action.metavar for action in TRAIN._actions
    ]


def test_the_magics():
    """Their names, each with a help text."""
    from nbdist.notebook.magics import DistMagics

    registered = DistMagics.magics["line"] | DistMagics.magics["cell"]
    assert MAGICS == sorted(registered)
    for name, method in registered.items():
        assert inspect.getdoc(getattr(DistMagics, method) if isinstance(method, str) else method), name


def test_train_takes_every_option():
    """Each option of the Plan is a keyword of `nbdist.train`."""
    parameters = inspect.signature(nbdist.train).parameters
    assert [] == [name for name in OPTIONS if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY]


def test_train_explains_every_keyword():
    """Its docstring has a line for each parameter."""
    explained = inspect.getdoc(nbdist.train).split("Args:")[1].split("Returns:")[0]
    for name in inspect.signature(nbdist.train).parameters:
        assert f"    {name}: " in explained, name


def test_defaults_are_the_plans():
    """A keyword of `nbdist.train` repeats no default but the optimizer's, which must agree."""
    parameters = inspect.signature(nbdist.train).parameters
    defaults = {name: parameters[name].default for name in OPTIONS}
    assert {"optimizer": Plan.optimizer} == {name: value for name, value in defaults.items() if value is not None}


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
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []
