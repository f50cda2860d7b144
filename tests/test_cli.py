"""The command line. ``make demo`` tests ``nbdist demo``."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import nbdist
from nbdist.cli import main


def test_version_is_that_of_the_package():
    """Through ``python -m nbdist``, as a process of its own."""
    done = subprocess.run([sys.executable, "-m", "nbdist", "version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"nbdist {nbdist.__version__}\n"


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_usage_names_every_command(capsys, words):
    """With --help, or without arguments."""
    assert main(words) == 0
    usage = capsys.readouterr().out
    assert all(f"nbdist {command}" in usage for command in ("demo", "doctor", "version", "nbval-sanitize"))


@pytest.mark.usefixtures("shared_cluster")  # who asks for engines starts its fork server
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["docter"], "unknown command 'docter': use demo, version, doctor, nbval-sanitize. Did you mean 'doctor'?"),
        (["version", "now"], "nbdist version: unknown argument 'now'."),
        (["doctor", "-n", "0"], "0 engines is too few: use 1 or more."),
        (["doctor", "-n", "two"], "nbdist doctor: argument -n: invalid int value: 'two'."),
        (["doctor", "--device", "gpu"], "unknown device 'gpu': use auto, cpu or cuda. Did you mean 'cpu'?"),
        (["doctor", "--batchsize", "3"], "nbdist doctor: unknown argument '--batchsize'. Did you mean '--batch-size'?"),
        (["demo", "nowhere.ipynb"], "there is no nowhere.ipynb here: run it in a checkout, or name a notebook."),
    ],
)
def test_mistakes_are_reported_in_one_line(capsys, words, message):
    """On standard error, with status 2."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == f"nbdist: {message}\n"


def test_doctor_starts_meets_and_trains(shared_cluster, capsys):
    """With the options of a training; it reports its findings, and leaves nothing running."""
    shared_cluster.stop()
    assert main(["doctor", "-n", "2", "--device", "cpu", "--steps", "3", "--optimizer", "sgd"]) == 0
    report = capsys.readouterr().out
    assert re.search(r"2 engines started and completed a collective in [\d.]+ s: Cluster\(engines=2\)", report)
    assert report.endswith("a training of 3 steps finished: all is well\n")
    for package in ("torch", "ipyparallel", "ipykernel"):
        assert re.search(rf"^  {package} +\d", report, re.MULTILINE)
    assert nbdist.current_cluster() is None
