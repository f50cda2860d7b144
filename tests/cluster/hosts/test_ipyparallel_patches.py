"""What we change in ipyparallel: a new version, or a place that has changed, fails here before it fails at a user's."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import signal
import subprocess
import sys
import types

import ipyparallel
import psutil
import pytest
from ipyparallel.cluster import launcher as launchers
from ipyparallel.controller import app as controller
from ipyparallel.engine import app as engine
from ipyparallel.engine import nanny
from ipyparallel.error import RemoteError
from shared_cluster import HUNG_S, pids_of, until

from nbdist.cluster.calls.pending_call import EngineDied
from nbdist.cluster.hosts import ipyparallel_patches as patches
from nbdist.cluster.launch.launcher import ForkedController, Launch

pytestmark = pytest.mark.programs


@pytest.fixture
def launch():
    """One engine of the test's own."""
    launched = Launch(1)
    launched.wait_for(1, HUNG_S, lambda text: None)
    yield launched
    launched.end()


def calls(function, name):
    """The calls of a name, such as ``time.sleep``, in a function or a module."""
    found = [node for node in ast.walk(ast.parse(inspect.getsource(function).lstrip())) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func) == name]


def test_this_version_was_read():
    """After an upgrade: read what the patches touch, run the tests with both versions, and add it to VERIFIED."""
    assert ipyparallel.__version__ in patches.VERIFIED


def test_each_module_that_is_loaded_ahead_exists():
    """The fork server would load nothing, and each engine everything."""
    assert patches.CONTROL_PLANE == [importlib.import_module(name).__name__ for name in patches.CONTROL_PLANE]


def test_the_controller_sleeps_once():
    """For a quarter of a second, through its module's own `time`; else the patch skips what it should not."""
    assert ["time.sleep(0.25)"] == [ast.unparse(call) for call in calls(controller, "time.sleep")]


def test_the_controllers_sleep_is_skipped_and_nothing_else(monkeypatch):
    """The rest of `time` stays; so does everybody else's."""
    import time

    monkeypatch.setattr(controller, "time", time)
    assert patches.skip_controller_sleep()
    assert (None, time.monotonic) == (controller.time.sleep(1e9), controller.time.monotonic)
    assert time.sleep is not controller.time.sleep


def test_an_engine_starts_its_nanny_through_one_name():
    """By keyword, and keeps url and pipe of what it returns."""
    (call,) = calls(engine.IPEngine, "start_nanny")
    assert ([], engine.start_nanny) == (call.args, nanny.start_nanny)
    assert "nanny_url, self.nanny_pipe = self.start_nanny(" in inspect.getsource(engine.IPEngine)


def test_a_nanny_reads_its_arguments_from_standard_input():
    """Pickled, with the pid that `start_nanny` adds; and answers with a line."""
    assert ["pickle.load(f)"] == [ast.unparse(call) for call in calls(nanny.main, "pickle.load")]
    assert "kwargs['pid'] = os.getpid()" in ast.unparse(ast.parse(inspect.getsource(nanny.start_nanny)))
    assert calls(nanny.KernelNanny.start, "self.pipe.write")


def test_the_nanny_is_forked(launch):
    """It is no Python of its own, and tells of its engine's death."""
    (pid,) = pids_of(launch)
    (watcher,) = until(lambda: [p for p in psutil.Process(pid).children() if p.name() == "nbdist-nanny"])
    (known,) = launch.client.ids
    call = launch.client.start_cell(known, "import time; time.sleep(1e6)")
    os.kill(pid, signal.SIGKILL)
    assert isinstance(call.exception(HUNG_S), EngineDied)
    assert launch.client.wait_until_dead([known], HUNG_S)
    assert [] == launch.client.ids
    with pytest.raises(EngineDied):
        launch.client.start_call(known, "ping")
    until(lambda: not watcher.is_running())


def test_a_local_launcher_waits_for_its_process_by_one_method():
    """`adopt` calls it; `from_dict` does the same for a process of another kernel."""
    source = inspect.getsource(launchers.LocalProcessLauncher._reconstruct_process)
    assert "self.process = psutil.Process(d['pid'])" in source
    assert "self._start_waiting()" in source


def test_our_launcher_is_found_by_the_name_that_a_saved_cluster_has():
    """Another kernel imports it by that."""
    module, _, name = launchers.abbreviate_launcher_class(ForkedController).rpartition(".")
    assert getattr(importlib.import_module(module), name) is ForkedController


@pytest.mark.parametrize("version", [(10, 0, 0), (7, 1, 0)])
def test_no_patch_is_applied_to_a_major_version_that_nobody_has_read(version, monkeypatch):
    """ipyparallel's own way is slower, and works."""
    monkeypatch.setattr(ipyparallel, "version_info", version)
    before = controller.time, engine.start_nanny
    assert (False, False) == (patches.skip_controller_sleep(), patches.fork_nanny())
    assert before == (controller.time, engine.start_nanny)


def test_a_cluster_starts_without_any_patch(shared_cluster, tmp_path, monkeypatch):
    """As it will with the next major version."""
    shared_cluster.stop()
    (tmp_path / "sitecustomize.py").write_text(UNPATCHED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import nbdist\nwith nbdist.Cluster(1, device='cpu') as c:\n    print(c.engines[0].state)"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HUNG_S)
    assert ("idle", 0) == (alone.stdout.strip(), alone.returncode), alone.stderr


UNPATCHED = """
import nbdist.cluster.hosts.ipyparallel_patches as patches
patches._has = lambda place, *names: False
"""


def test_a_death_names_no_engine():
    """That is how it is told from an exception there."""
    there = {"engine_id": 0, "engine_uuid": "", "method": "apply"}
    assert patches.is_death(RemoteError("EngineError", "Engine 0 died", ""))
    assert not patches.is_death(RemoteError("EngineError", "overheated", "", there))
    assert not patches.is_death(RemoteError("TypeError", "", ""))


def test_what_has_no_such_name_is_not_patched(monkeypatch):
    """Where upstream has moved it."""
    assert patches._has(types.SimpleNamespace(a=1), "a")
    assert not patches._has(types.SimpleNamespace(a=1), "a", "b")
