"""Fork server: engines are forks of one process with torch loaded, and otherwise like separate processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import ipyparallel
import psutil
import pytest
import torch
from shared_cluster import ENGINES, until
from tasks import classes, copied, net, same

import nbdist
from nbdist.cluster.hosts.fork_client import ForkRequest, ForkServer, current_server, end_server, require_server
from nbdist.engine.parent_watch import FOLDER_VARIABLE
from nbdist.errors import ClusterError
from nbdist.process_mark import has_ended

pytestmark = pytest.mark.programs

COMPILER = "import sys; print(bool({'torch._dynamo', 'sympy'} & set(sys.modules)))"
FACTS = "import os, time; print(os.environ.get('NBDIST_TEST'), os.getcwd(), time.localtime().tm_zone, sep='\\n')"
OWNER = """
import os, sys
from nbdist.cluster.hosts.fork_client import require_server

pid, heir = require_server().pid, os.fork()
if heir:
    print(pid, heir, flush=True)
sys.stdin.read()
os._exit(0)
"""


def out(cluster, source, ranks=None):
    cell = cluster.execute(source, ranks)
    cell.wait()
    return [text.strip() for text in cell.printed().values()]


def parents(cluster):
    """The parents of the engines."""
    return {psutil.Process(engine.pid).ppid() for engine in cluster.engines}


def name(process):
    """Of a process, which may have just ended."""
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


@pytest.fixture
def fresh(shared_cluster):
    """Two new engines."""
    shared_cluster.stop()
    return shared_cluster.ready()


@pytest.fixture
def forks():
    """A fork server of the test's own."""
    forks = ForkServer()
    yield forks
    forks.end()


@pytest.fixture(scope="module")
def second_start(shared_cluster, tmp_path_factory):
    """The server of a start and of the next one, and what an engine of the next one reports, by topic.

    In between the notebook went to another folder and time zone and set a variable.
    """
    shared_cluster.ready()
    servers, folder = [current_server().pid], tmp_path_factory.mktemp("second start")
    shared_cluster.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NBDIST_TEST", "set just before")
        patch.setenv("TZ", "Asia/Tokyo")
        with nbdist.Cluster(1, device="cpu") as one:
            servers += [*parents(one), current_server().pid]
            (reported,) = out(one, FACTS)
    variable, there, zone = reported.split("\n")
    return {"servers": set(servers), "variable": variable, "folder": there, "cwd": str(folder), "zone": zone}


def test_controller_and_engines_are_children_of_the_server(cluster):
    """And the server is a child of this process."""
    server = psutil.Process(current_server().pid)
    assert server.ppid() == os.getpid()
    assert {server.pid} == parents(cluster)
    until(lambda: cluster.spare_engines)
    expected = ["nbdist-controll", *["nbdist-engine"] * (ENGINES + cluster.spares)]
    until(lambda: expected == sorted(map(name, server.children())))  # those of an earlier test may be ending


def test_engines_draw_different_numbers(cluster):
    """From Python's and from NumPy's generators, although their state was forked."""
    first, second = out(cluster, "import random, numpy; print(random.random(), numpy.random.rand())")
    assert not set(first.split()) & set(second.split())


def test_no_gpu_was_touched_before_the_fork(cluster):
    """CUDA is not initialised on a new engine, and could be."""
    source = "import torch; print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())"
    assert ["False False"] * 2 == out(cluster, source)


def test_a_second_start_uses_the_same_server(second_start):
    """With another number of engines, too."""
    assert len(second_start["servers"]) == 1


def test_engines_have_the_environment_of_the_notebook_at_their_start(second_start):
    """Not the one in which the server was started."""
    assert "set just before" == second_start["variable"]


def test_engines_run_in_the_folder_of_the_notebook_at_their_start(second_start):
    """Not in the one in which the server was started."""
    assert second_start["cwd"] == second_start["folder"]


def test_engines_have_the_time_zone_of_the_notebook_at_their_start(second_start):
    """Not the one in which the server was started."""
    assert "JST" == second_start["zone"]


def test_engines_share_the_memory_of_torch(fresh):
    """An idle engine has less than half the private memory of a process that loads torch."""
    alone = psutil.Process(current_server().pid).memory_info().rss
    assert max(psutil.Process(engine.pid).memory_full_info().uss for engine in fresh.engines) < alone / 2


def test_a_run_loads_no_compiler(fresh):
    """Neither with an optimizer by name nor with the user's own; a cell can still load it."""
    assert ["False"] * 2 == out(fresh, COMPILER)
    options = {"loss": "cross_entropy", "steps": 2, "val": classes(), "metric": "accuracy", "clip_norm": 1.0}
    fresh.train(net(), classes(), optimizer="adamw", **options)
    assert ["False"] * 2 == out(fresh, COMPILER)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        fresh.train(model, classes(), optimizer=optimizer, **options)
    assert 4 == next(iter(optimizer.state.values()))["step"]
    assert ["False"] * 2 == out(fresh, COMPILER)
    compiled = "import torch._dynamo; print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    assert ["2.0"] == out(fresh, compiled, [1])
    assert "finished" == fresh.train(model, classes(), optimizer=optimizer, **options).state


def test_a_killed_engine_leaves_no_zombie_and_the_same_server_replaces_it(cluster):
    """The server never waits for its children."""
    server, lost = require_server(), cluster.engines[1].pid
    os.kill(lost, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(lost))
    until(lambda: cluster.engines[1].state == "lost")
    cluster.start()
    assert psutil.Process(cluster.engines[1].pid).ppid() == server.pid
    assert current_server() is server


def test_engines_run_on_without_their_server_and_the_next_start_makes_a_new_one(cluster):
    """After a kill -9 of the server in the middle of a training."""
    server = psutil.Process(current_server().pid)
    run = cluster.train(net(), classes(), loss="cross_entropy", steps=10**9, background=True)
    until(lambda: run.progress.step)
    server.kill()
    until(lambda: current_server() is None)
    step = run.progress.step
    until(lambda: run.progress.step > step)
    run.stop()
    assert "stopped" == run.wait().state
    cluster.stop()
    cluster.start()
    assert server.pid != current_server().pid
    assert {current_server().pid} == parents(cluster)


def test_without_the_server_a_training_gives_the_same_bits(cluster, monkeypatch):
    """Engines are then Python processes of their own, children of this one."""
    models = [net(), net()]
    options = {"loss": "cross_entropy", "epochs": 3, "batch_size": 16}
    history = cluster.train(models[0], classes(), **options).history
    cluster.stop()
    end_server()
    monkeypatch.setenv("NBDIST_FORK", "off")
    with cluster:
        assert current_server() is None
        assert {os.getpid()} == parents(cluster)
        assert all("nbdist.engine.parent_watch" in psutil.Process(e.pid).cmdline() for e in cluster.engines)
        run = cluster.train(models[1], classes(), **options)
    assert same(models[1], copied(models[0]))
    assert [row["loss"] for row in history] == [row["loss"] for row in run.history]


def test_a_library_that_starts_a_thread_is_not_forked(shared_cluster, tmp_path, monkeypatch):
    """A thread would be missing in the fork: engines start as processes of their own, a warning says why."""
    shared_cluster.stop()
    thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    (tmp_path / "sitecustomize.py").write_text(thread)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    why = "cannot fork: a library has started threads while it was loaded. Processes start one by one instead"
    cluster = nbdist.Cluster(1, device="cpu")
    with pytest.warns(UserWarning, match=why):
        cluster.start()
    with cluster:
        assert {os.getpid()} == parents(cluster)
        assert "finished" == cluster.train(net(), classes(), loss="cross_entropy").state


def test_a_variable_that_libraries_read_when_loaded_needs_a_new_server(monkeypatch):
    """The old one ends; any other variable makes no difference."""
    old = require_server()
    monkeypatch.setenv("NBDIST_TEST", "1")
    assert require_server() is old
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    new = require_server()
    until(lambda: "3" == psutil.Process(new.pid).environ().get("OMP_NUM_THREADS"))
    until(lambda: not psutil.pid_exists(old.pid))
    assert (False, True) == (old.alive, new.alive)
    assert require_server() is current_server() is new


class InterruptedPipe:
    """The pipe to a fork server: an interrupt comes as soon as the caller waits for the answer."""

    def __init__(self, pipe):
        self.send = pipe.send

    def recv(self):
        signal.raise_signal(signal.SIGINT)


def test_the_process_of_an_interrupted_request_is_killed(forks, tmp_path, monkeypatch):
    """By the next request, which gets its own process."""

    def request(kind, argument):
        log = str(tmp_path / kind)
        return ForkRequest(
            arguments=[kind, argument], environment=dict(os.environ), folder=str(tmp_path), log=log, cores={0}
        )

    engine = request("engine", f"--profile-dir={tmp_path}")  # waits for torch, and then for a controller
    with monkeypatch.context() as patch:
        patch.setattr(forks, "_pipe", InterruptedPipe(forks._pipe))
        with pytest.raises(KeyboardInterrupt):
            forks.fork(engine)
    server = psutil.Process(forks.pid)  # which may have children of a moment too, while it loads torch
    (late,) = until(lambda: [child for child in server.children() if name(child) == "nbdist-engine"])
    nannies = until(late.children)
    assert late.pid != forks.fork(request("controller", "--version"))
    until(lambda: all(map(has_ended, [late, *nannies])))
    output = tmp_path / "controller"
    until(lambda: output.exists() and f"{ipyparallel.__version__}\n" == output.read_text())


def test_what_was_forked_for_a_cluster_ends_with_its_folder(forks, tmp_path):
    """Even an engine that is only just starting, which would create the folder again; another cluster's stays."""
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    processes = []
    for folder in folders:
        os.makedirs(f"{folder}/profile")  # without it the engine ends
        environment = {**os.environ, FOLDER_VARIABLE: folder}
        # It waits for a controller, and would give up after ten seconds.
        arguments = ["engine", f"--profile-dir={folder}/profile", "--IPEngine.wait_for_url_file=1000000"]
        request = ForkRequest(arguments=arguments, environment=environment, folder=folder, log=os.devnull, cores={0})
        processes.append(psutil.Process(forks.fork(request)))
    forks.end_cluster(folders[0])
    until(lambda: [True, False] == [has_ended(process) for process in processes])
    assert [False, True] == [os.path.exists(folder) for folder in folders]
    forks.end_cluster(folders[1])
    until(lambda: has_ended(processes[1]))


def test_a_server_that_was_ended_forks_no_more(forks, tmp_path):
    """`end` twice is fine, and a request is refused."""
    forks.end()
    forks.end()
    assert not psutil.pid_exists(forks.pid)
    with pytest.raises(ClusterError, match="the fork server has ended"):
        forks.fork(
            ForkRequest(arguments=["controller"], environment={}, folder=str(tmp_path), log=os.devnull, cores={0})
        )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_the_server_ends_with_its_owner(how):
    """Although a fork of the owner, as a data worker may be, still holds the pipe to it."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    with owner:
        server, heir = (psutil.Process(int(pid)) for pid in owner.stdout.readline().split())
        owner.send_signal(how)
        until(lambda: has_ended(server))
        assert not has_ended(heir)
    until(lambda: has_ended(heir))
