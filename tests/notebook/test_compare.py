"""`%dist_compare`: runs of this notebook, and recorded ones."""

from __future__ import annotations

import pytest

from nbdist.errors import NbdistError


def test_a_sweep_is_compared(notebook):
    """A dict of runs by value, the newest ones, or named ones: each with what differs."""
    notebook(
        "runs = {}\n"
        "for rate in (0.5, 0.25):\n"
        "    runs[rate] = %dist_train Net() train_set --loss cross_entropy --lr rate --val test_set --background\n"
        "for run in runs.values():\n"
        "    run.wait()"
    )
    runs = notebook.names["runs"]
    compared = notebook("%dist_compare runs")
    assert ["0.5", "0.25"] == list(compared.runs)
    assert compared.best in compared.runs
    assert "lr" in repr(compared).splitlines()[1].split()
    first, second = (run.run_id for run in runs.values())
    assert [second, first] == list(notebook("%dist_compare -n 2").runs)
    assert [first, second] == list(notebook(f"%dist_compare {first} runs[0.25]").runs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rusn", "'rusn' is not defined in the notebook"),
        ("3", "there is no record of a run '3'"),
        ("len", "compare takes a dict or a list of runs, not <built-in function len>"),
        ("", "compare takes at least one run, and here is none"),
    ],
)
def test_mistakes_are_one_sentence(notebook, home, words, message):
    """With what is wrong."""
    error, _ = notebook.fails(f"%dist_compare {words}")
    assert isinstance(error, NbdistError)
    assert message in str(error)
