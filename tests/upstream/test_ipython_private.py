"""What IPython, ipykernel and cloudpickle do not document does what we think, and each has a way without it."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import sys
import types

import cloudpickle
import pytest
from ipykernel.kernelbase import Kernel
from IPython.core.interactiveshell import InteractiveShell

from nbdist.upstream import ipython_private as private


@pytest.mark.parametrize("package", private.VERIFIED)
def test_this_version_was_tested(package):
    """After an upgrade: read DECISIONS.md, "Private APIs", run all tests with it, and add it to VERIFIED."""
    assert importlib.import_module(package).__version__ in private.VERIFIED[package]


@pytest.fixture
def shell(monkeypatch):
    """An IPython of the test's own."""
    made = InteractiveShell()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: made)
    return made


def test_a_cells_file_has_its_number(shell):
    """Any other file has none."""
    name = shell.compile.cache("1 + 1", 5)
    if hasattr(shell.compile, "_filename_map"):  # IPython 7.34 has none, and its names are the labels
        assert 5 == private.cell_number(name)
    assert private.cell_number(__file__) is None


def test_without_ipythons_map_a_cell_has_no_number(shell, monkeypatch):
    """Nor without IPython."""
    name = shell.compile.cache("1 + 1", 5)
    shell.compile = types.SimpleNamespace()
    assert private.cell_number(name) is None
    monkeypatch.delitem(sys.modules, "IPython")
    assert private.cell_number(name) is None


def autoreloads(shell, folder, monkeypatch, text):
    """A module of a text, imported in a shell with ``%autoreload 2``; and a function that writes another one."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "autoreloaded", raising=False)
    path, clock = folder / "autoreloaded.py", iter(range(2_000_000_000, 2_000_000_100))

    def write(text):
        path.write_text(text)
        os.utime(path, (now := next(clock), now))

    write(text)
    shell.run_line_magic("load_ext", "autoreload")
    shell.run_line_magic("autoreload", "2")
    module = importlib.import_module("autoreloaded")
    shell.run_cell("1")
    return module, write


def test_what_autoreload_has_patched_is_known(shell, tmp_path, monkeypatch):
    """With and without a reload; without it there is no such text."""
    assert private.autoreloaded_text("autoreloaded") is None
    module, write = autoreloads(shell, tmp_path, monkeypatch, "def f():\n    return 1\n")
    write("def f():\n    return 2\n")
    spec = module.__spec__
    shell.run_cell("1")
    assert 2 == module.f()
    if module.__spec__ is spec:  # patched; IPython 7.34 reloads
        assert "def f():\n    return 2\n" == private.autoreloaded_text("autoreloaded")


def test_a_reload_in_place_changes_what_exists(shell, tmp_path, monkeypatch):
    """A function that was imported from the module, and an instance's class."""
    module, write = autoreloads(shell, tmp_path, monkeypatch, "class A:\n    x = 1\ndef f():\n    return 1\n")
    f, a = module.f, module.A()
    write("class A:\n    x = 2\ndef f():\n    return 2\n")
    private.reload_in_place(module)
    assert (2, 2, True) == (f(), a.x, isinstance(a, module.A))


def test_without_ipythons_reload_a_module_is_reloaded_as_python_does(tmp_path, monkeypatch, shell):
    """What exists stays old."""
    module, write = autoreloads(shell, tmp_path, monkeypatch, "def f():\n    return 1\n")
    monkeypatch.setitem(sys.modules, "IPython.extensions.autoreload", None)
    f = module.f
    write("def f():\n    return 2\n")
    private.reload_in_place(module)
    assert (1, 2) == (f(), module.f())


def test_the_file_of_a_cell_is_the_one_that_ipykernel_compiles_it_as():
    """The base name, for the folder is of another process."""
    from ipykernel.compiler import XCachingCompiler

    name = private.cell_file("1 + 1")
    assert name.endswith(".py")
    assert XCachingCompiler().get_code_name("1 + 1", "1 + 1", 1).endswith(f"/{name}")


def test_without_ipykernels_compiler_the_file_is_unknown(monkeypatch):
    """As in ipykernel 5."""
    monkeypatch.setitem(sys.modules, "ipykernel.compiler", None)
    assert "" == private.cell_file("1 + 1")


def defined():
    """A class that is pickled by value."""
    kind = type("Defined", (), {})
    kind.__module__ = "__main__"
    return kind


def test_a_class_that_is_sent_arrives_as_the_class_with_its_mark():
    """Else as a twin."""
    here, twin = defined(), defined()
    mark = private.class_mark(here)
    assert mark
    assert mark == private.class_mark(here) != private.class_mark(defined())
    sent = cloudpickle.dumps(here)
    assert pickle.loads(sent) is here
    private.set_class_mark(twin, mark)
    assert pickle.loads(sent) is twin


def test_without_cloudpickles_tracker_a_class_has_no_mark(monkeypatch):
    """And none is set."""
    for name in ("_get_or_create_tracker_id", "_DYNAMIC_CLASS_TRACKER_BY_CLASS", "_DYNAMIC_CLASS_TRACKER_BY_ID"):
        monkeypatch.delattr(cloudpickle.cloudpickle, name)
    assert "" == private.class_mark(defined())
    private.set_class_mark(defined(), "")
    private.set_class_mark(defined(), "mark")


def test_what_aborts_cells_after_an_error_is_there():
    """Cells run without it, as `test_a_cell_runs_though_the_one_before_failed` shows."""
    assert callable(Kernel._abort_queues)
    private.run_cells_after_errors(None)


def test_clicks_go_where_the_front_end_chose():
    """Where a comm has a choice; elsewhere nothing is set."""
    choosing = types.SimpleNamespace(comm=types.SimpleNamespace(_reply_subshell_for=None))
    private.answer_while_busy(choosing)
    assert "chosen" == choosing.comm._reply_subshell_for({}, "chosen")
    plain = types.SimpleNamespace(comm=types.SimpleNamespace())
    private.answer_while_busy(plain)
    private.answer_while_busy(types.SimpleNamespace())
    assert {} == vars(plain.comm)


def test_the_kernel_restores_its_handler_of_interrupts_after_a_reply():
    """`remote_calls` ignores them until then."""
    assert "signal(SIGINT, self.saved_sigint_handler)" in inspect.getsource(Kernel.post_handler_hook)
