"""The magics around training, through a real shell: start, status, stop, cells on engines, values there and back."""

from __future__ import annotations

import re

import psutil
import pytest
import torch
from shared_cluster import until

import nbdist
from nbdist.cluster import current_server
from nbdist.errors import ClusterError, EngineError, NbdistError, PlanError, TaskError
from nbdist.notebook import parsers
from nbdist.plan.arguments import split_line


def test_loading_the_extension_does_not_load_torch(tmp_path):
    """It takes a moment; torch is imported when needed."""
    import subprocess
    import sys

    code = """
from IPython.core.interactiveshell import InteractiveShell
import sys
shell = InteractiveShell(ipython_dir=sys.argv[1])
shell.history_manager.enabled = False
shell.run_cell("%load_ext nbdist").raise_error()
assert "dist_train" in shell.magics_manager.magics["cell"]
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_start_tells_what_it_started_and_stop_ends_it(notebook):
    """Engines, ranks, host, devices and threads at the start; both can be called twice, and report it."""
    notebook("%dist_stop")
    assert notebook.printed() == "stopped 2 engines\n"
    notebook("%dist_stop")
    assert notebook.printed() == "no engines are running\n"
    for line in ("%dist_train model train_set --loss mse", "%dist_push X", "%dist_pull X", "%%dist\n1"):
        error, _ = notebook.fails(line)
        assert isinstance(error, ClusterError)
        assert str(error).startswith("no engines are running: start them with %dist_start")

    notebook("%dist_start -n 2 --device cpu --timeout 90")
    threads = max(1, nbdist.plan.available_cores() // 2)
    what = rf"2 engines \(ranks 0-1\) on \S+: cpu over shared memory, {threads} threads? each"
    assert re.fullmatch(rf"started {what}, in [\d.]+ s\n", notebook.printed())
    before = nbdist.current_cluster()
    for again in ("%dist_start", "%dist_start -n 2", "%dist_start --device cpu"):
        notebook(again)
        assert re.fullmatch(rf"already running: {what}\n", notebook.printed())
    assert nbdist.current_cluster() is before


def test_the_fork_server_stays_until_it_is_stopped_too(notebook):
    """The status shows it, with and without engines, and its memory; ``--all`` ends both, or the running one."""
    server = psutil.Process(current_server().pid)
    line = rf"fork server for a quick start: pid {server.pid}, [\d,.]+ MiB \(%dist_stop --all ends it\)"
    notebook("%dist_status", "%dist_stop")
    *_, last, stopped = notebook.printed().splitlines()
    assert re.fullmatch(line, last)
    assert stopped == "stopped 2 engines"
    notebook("%dist_status")
    first, *_, last = notebook.printed().splitlines()
    assert first == "no engines are running: %dist_start starts them"
    assert re.fullmatch(line, last)
    notebook("%dist_stop --all", "%dist_stop --all", "%dist_status")
    stopped, again, first, *rest = notebook.printed().splitlines()
    assert (stopped, again) == ("stopped the fork server", "no engines are running")
    assert first == "no engines are running: %dist_start starts them"
    assert "fork server" not in "".join(rest)
    assert not psutil.pid_exists(server.pid)
    notebook("%dist_start -n 2 --device cpu")
    server = current_server()
    notebook.printed()
    notebook("%dist_stop --all")
    assert notebook.printed() == "stopped 2 engines and the fork server\n"
    assert not psutil.pid_exists(server.pid)


def test_start_replaces_a_lost_engine_and_says_so(notebook, cluster):
    """The others keep their process."""
    stays, lost = cluster.engines
    psutil.Process(lost.pid).kill()
    until(lambda: cluster.engines[1].state == "lost")
    notebook("%dist_start")
    assert notebook.printed().startswith("replaced rank 1: 2 engines (ranks 0-1)")
    assert [stays.pid, "idle", "idle"] == [cluster.engines[0].pid, *(engine.state for engine in cluster.engines)]


def test_status_shows_each_engine_and_the_newest_run(notebook, cluster):
    """One row an engine and spare: rank, process, host, device, state, memory. The fork server has the last line."""
    notebook("%dist_start --spares 1", "%dist_train model train_set --loss cross_entropy --steps 1")
    (spare,) = until(lambda: cluster.spare_engines)
    notebook.printed()
    notebook("%dist_status")
    header, *rows, idle, newest, server = [line.split() for line in notebook.printed().splitlines()]
    assert header == ["rank", "pid", "host", "device", "state", "memory", "works", "on"]
    for row, engine in zip(rows, cluster.engines, strict=True):
        assert row[:5] == [str(engine.rank), str(engine.pid), engine.host, "cpu", "idle"]
        assert 50 < float(row[5].replace(",", "")) < 5000
        assert row[6:] == ["MiB", "–"]
    assert idle[:5] == ["spare", str(spare.pid), spare.host, "–", "idle"]
    assert newest[:3] == ["newest", "run", f"{nbdist.last_run().run_id}:"]
    assert "finished" in newest
    assert server[:2] == ["fork", "server"]


def test_a_cell_runs_on_all_engines_and_is_labelled(notebook):
    """Identical lines are printed once; results and rich output are labelled with their ranks."""
    notebook.printed()
    notebook("%%dist\nprint('hello')\nprint('I am', rank)\nworld_size * 10")
    assert notebook.printed() == "[0-1] hello\n[0] I am 0\n[1] I am 1\n[0-1] Out: 20\n"
    notebook("%%dist --ranks 1\ndisplay({'text/plain': 'shown'}, raw=True)\nrank")
    assert notebook.printed() == "[1] display: shown\n[1] Out: 1\n"
    notebook("%%dist --ranks 0\n%%capture taken\nprint('quiet')")
    assert notebook.printed() == ""


@pytest.mark.parametrize(
    ("ranks", "ran"), [("0", "[0]"), ("1", "[1]"), ("0,1", "[0-1]"), ("0-1", "[0-1]"), ("1,0-1", "[0-1]")]
)
def test_ranks_are_chosen(notebook, ranks, ran):
    """By number, list or range; twice is once."""
    notebook.printed()
    notebook(f"%%dist --ranks {ranks}\nprint('x')")
    assert notebook.printed() == f"{ran} x\n"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("2", "rank 2 does not exist: use 0 to 1."),
        ("0-7", "rank 2 does not exist: use 0 to 1."),
        ("one", "--ranks 'one' is not a list of ranks: write it like 0,2-3."),
        ("1-", "--ranks '1-' is not a list of ranks: write it like 0,2-3."),
        ("1-0", "--ranks '1-0' is not a list of ranks: write it like 0,2-3."),
    ],
)
def test_ranks_that_do_not_exist_are_refused(notebook, ranks, message):
    """Before anything runs."""
    error, shown = notebook.fails(f"%%dist --ranks {ranks}\nprint('ran')")
    assert type(error) is PlanError
    assert str(error) == message
    assert shown.strip() == f"PlanError: {message}"


def test_a_cell_that_fails_shows_the_engines_lines_and_fails(notebook):
    """The traceback is the engine's, with the cell's number and the user's line number; no frame of nbdist."""
    number = notebook.shell.execution_count
    error, shown = notebook.fails("%%dist\nprint('before')\nz = 1\nz / (rank - 1)")
    assert isinstance(error, EngineError)
    assert str(error) == "rank 1: ZeroDivisionError: division by zero"
    assert shown.startswith("[0-1] before\n")
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert f"Cell In[{number}], line 4" in plain
    assert "----> 4 z / (rank - 1)" in plain
    assert "nbdist/" not in shown
    assert shown.rstrip().endswith("EngineError: rank 1: ZeroDivisionError: division by zero")


def test_a_local_cell_runs_here_too_and_its_classes_are_one(notebook):
    """An instance made on an engine is of the notebook's class; a cell that fails here is not sent to engines."""
    notebook("%%dist --local\nclass Twin:\n    x = 1\nmade = Twin()\nprint('on', globals().get('rank', 'notebook'))")
    assert notebook.printed() == "on notebook\n[0] on 0\n[1] on 1\n"
    pulled = notebook("%dist_pull made --rank 1")
    assert type(pulled) is notebook.names["Twin"]
    notebook("%%dist\nreached = 1")
    error, shown = notebook.fails("%%dist --local\nreached = 2\nraise KeyError('here')")
    assert isinstance(error, ClusterError)
    assert "KeyError: 'here'" in shown
    assert notebook("%dist_pull reached") == 1


def test_values_go_to_the_engines_and_return(notebook):
    """Several at once; the line magic returns the value, and the object is of the notebook's own class."""
    notebook.printed()
    notebook("w = torch.arange(3.)", "%dist_push w model")
    assert notebook.printed() == "sent w, model to 2 engines\n"
    notebook("%%dist\nw += rank\nkind = type(model).__name__")
    notebook("v = %dist_pull w --rank 1", "there = %dist_pull model")
    assert torch.equal(notebook.names["v"], torch.tensor([1.0, 2, 3]))
    assert type(notebook.names["there"]) is notebook.names["Net"]
    assert notebook("%dist_pull w").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("%dist_push wrong", TaskError, "'wrong' is not defined in the notebook."),
        ("%dist_push modle", TaskError, "'modle' is not defined in the notebook. Did you mean 'model'?"),
        ("%dist_push X+1", PlanError, "'X+1' is not a name: assign it to one first."),
        ("%dist_push", PlanError, "%dist_push: the following arguments are required: NAME."),
        ("%dist_pull nowhere", ClusterError, "'nowhere' is not defined on rank 0."),
        ("%dist_pull rank --rank 2", PlanError, "rank 2 does not exist: use 0 to 1."),
        ("%dist_pull rank --rnak 1", PlanError, "%dist_pull: unknown argument '--rnak'. Did you mean '--rank'?"),
        ("%dist_start -n many", TaskError, "-n: 'many' is not defined in the notebook."),
        ("%dist_start -n 0", PlanError, "0 engines is too few: use 1 or more."),
        ("%dist_start -n 9999", PlanError, "9999 engines are more than this machine can run"),
        ("%dist_start --device tpu", PlanError, "unknown device 'tpu': use auto, cpu or cuda."),
        ("%dist_start --timeout -1", PlanError, "timeout -1 s is too short"),
        ("%dist_start --spares -1", PlanError, "-1 spares are not possible: use a whole number, 0 or more."),
        ("%dist_start --nn 2", PlanError, "%dist_start: unknown argument '--nn'."),
        ("%dist_stop now", PlanError, "%dist_stop: unknown argument 'now'."),
        ("%dist_status --all", PlanError, "%dist_status: unknown argument '--all'."),
        ("%%dist --rank 0\n1", PlanError, "%%dist: unknown argument '--rank'. Did you mean '--ranks'?"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(notebook, cluster, line, kind, message):
    """One error that names the value and the cure, no traceback, and the engines continue."""
    pids = [engine.pid for engine in cluster.engines]
    error, shown = notebook.fails(line)
    assert isinstance(error, NbdistError)
    assert isinstance(error, kind)
    assert str(error).startswith(message)
    assert shown.strip() == f"{type(error).__name__}: {error}"
    assert [engine.pid for engine in nbdist.current_cluster().engines] == pids


def test_each_magic_has_the_help_of_its_parser(notebook):
    """It names every option, with its argument."""
    for name, options in (
        ("dist_start", ("-n N", "--device auto|cpu|cuda", "--timeout S", "--spares N")),
        ("dist_status", ("Show the engines",)),
        ("dist_stop", ("--all",)),
        ("dist_push", ("NAME",)),
        ("dist_pull", ("NAME", "--rank R")),
    ):
        help_text = notebook.shell.find_line_magic(name).__doc__
        assert all(option in help_text for option in options), name
    help_text = notebook.shell.find_cell_magic("dist").__doc__
    assert all(option in help_text for option in ("--ranks 0,2-3", "--local"))


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_arguments_of_a_launcher_are_quoted(quote):
    """And arrive without them."""
    line = f"--launcher slurm --launcher-args {quote}--partition gpu --time 2:00:00{quote}"
    assert parsers.START.parse(split_line(line), str).launcher_args == "--partition gpu --time 2:00:00"
