"""Parent watchdog: nothing outlives the process that started a cluster, however that process ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from shared_cluster import HUNG_S, folder_of, gone, marked, until

from nbdist.process_mark import process_mark

pytestmark = pytest.mark.programs

OWNER = """
import json, os, sys, tempfile
import nbdist, psutil, torch
from torch import nn

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return torch.ones(4), 0

cluster = nbdist.Cluster(1 if sys.argv[1] == "idle" else 2, device="cpu").start()
if sys.argv[1] == "training":
    loader = torch.utils.data.DataLoader(Rows(), num_workers=1, batch_size=16)
    run = cluster.train(nn.Linear(4, 3), loader, loss="cross_entropy", steps=10**9, background=True)
    while run.progress.step < 3: run.wait(0.05)
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)]), flush=True)
sys.stdin.read()
"""


TERMINATED = """
import os, signal, sys
from nbdist.engine import parent_watch

signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
for _ in range(2):
    parent_watch.outlive_termination()
os.kill(os.getpid(), signal.SIGTERM)
begun, begins = os.pipe()
if (child := os.fork()) == 0:
    os.write(begins, b"x")
    signal.pause()
os.read(begun, 1)
os.kill(child, signal.SIGTERM)
print(os.waitpid(child, 0)[1], flush=True)
parent_watch._owner_ended.set()
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("job", "printed"), [("7", f"{signal.SIGTERM.value}\n"), ("", "")])
def test_in_a_job_of_slurm_an_engine_outlives_sigterm(job, printed, monkeypatch):
    """Its children do not, nor does it itself once its owner has ended."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    ended = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True, check=False)
    assert (printed, 3, "") == (ended.stdout, ended.returncode, ended.stderr)


@pytest.fixture
def owners(tmp_path):
    """Processes that have a cluster each, one idle and one in the middle of a training with data workers.

    The idle engines were started by ipyparallel's own launchers, the others by the fork server.
    """
    (tmp_path / "owner.py").write_text(OWNER)
    started = {
        state: subprocess.Popen([sys.executable, tmp_path / "owner.py", state], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True, env={**os.environ, "NBDIST_FORK": fork})
        for state, fork in (("idle", "off"), ("training", "on"))
    }  # fmt: skip
    yield started
    for owner in started.values():
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()


def test_nothing_is_left_of_a_cluster_whose_owner_was_killed(shared_cluster, owners):
    """Controller, engines, nannies, data workers, folder and fork server are gone after kill -9."""
    pids = {state: json.loads(owner.stdout.readline()) for state, owner in owners.items()}
    processes = [psutil.Process(pid) for of_one in pids.values() for pid in of_one]
    names = {state: [psutil.Process(pid).name() for pid in of_one] for state, of_one in pids.items()}
    assert not [name for name in names["idle"] if name.startswith("nbdist-")]
    assert {"nbdist-controll", "nbdist-engine", "nbdist-nanny"} < set(names["training"])
    assert len(pids["idle"]) >= 4
    assert len(pids["training"]) >= 7, "two engines have a data worker each"
    folders = {folder for process in processes if (folder := folder_of(process))}
    assert len(folders) == 2
    assert all(folder.is_dir() for folder in folders)
    for owner in owners.values():
        owner.kill()
    assert gone(processes)
    until(lambda: not any(folder.exists() for folder in folders))
    until(lambda: not [process for process in marked() if folder_of(process) in folders])


HANGING_OWNER = """
import json, os, sys, threading
import nbdist, psutil

cluster = nbdist.Cluster(2, device="cpu").start()
hang = f"import ctypes; open({sys.argv[1]!r}, 'w').close(); ctypes.PyDLL(None).sleep(1000)"  # keeps Python's lock
cluster.execute(hang, [1])
while not os.path.exists(sys.argv[1]): threading.Event().wait(0.05)
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)]), flush=True)
sys.stdin.read()
"""


def test_an_engine_that_hangs_in_c_code_does_not_outlive_its_owner(shared_cluster, tmp_path):
    """Its watchdog thread cannot run, so the fork server kills it, and removes the folder."""
    owner = subprocess.Popen([sys.executable, "-c", HANGING_OWNER, tmp_path / "hangs"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    with owner:
        processes = [psutil.Process(pid) for pid in json.loads(owner.stdout.readline())]
        (folder,) = {folder for process in processes if (folder := folder_of(process))}
        owner.kill()
        assert len(processes) >= 6
        assert gone(processes)
        until(lambda: not folder.exists())


SERVER = """
import sys
from multiprocessing import Pipe
from nbdist.cluster.hosts import fork_server
from nbdist.process_mark import process_mark

fork_server._GRACE_S = 1000.0
ours, theirs = Pipe()
ours.close()
fork_server.serve(theirs, sys.argv[1])
"""


def test_a_fork_server_ends_as_soon_as_its_forks_have():
    """After its owner was killed, it waits for its forks, not for the whole grace period."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        server = subprocess.Popen([sys.executable, "-c", SERVER, process_mark(owner.pid)])
        try:
            owner.kill()
            assert server.wait(HUNG_S) == 0
        finally:
            server.kill()
            server.wait()
