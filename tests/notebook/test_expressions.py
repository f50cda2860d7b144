"""How a magic reads a word of its line."""

from __future__ import annotations

import pytest

from nbdist.errors import TaskError
from nbdist.notebook.expressions import read_word


@pytest.mark.parametrize(
    ("word", "read", "value"),
    [
        ("kept/{name}", "path", "kept/first"),
        ("'kept/{name}'", "path", "kept/first"),
        ("kept/{word}", "path", "kept/{word}"),  # a local of the reader
        (True, "path", True),
        ("nam", "text", "nam"),
        ("name", "value", "first"),
        ("text", "value", "name"),
        ("text", "quotable", "first"),
        ("'1 + 1'", "quotable", 2),
        ("mse", "callable", "mse"),
        ("own", "callable", len),
        ("text", "callable", "name"),
        ("'len if name else None'", "callable", len),
        ("'mse'", "callable", "mse"),
        ("text", "text", "name"),
        ("text + '=2'", "text", "name=2"),
        ("dp=2", "text", "dp=2"),
        ("200", "amount", "200"),
        ("every", "amount", "20"),
        ("every", "text", "every"),
        ("5min", "amount", "5min"),
        ("None", "text", None),
        ("None", "callable", None),
        (["names"], "text", ["a", "b"]),
        (["a", "b"], "text", ["a", "b"]),
        (["len"], "text", ["len"]),
        (["blocks"], "text", ["blocks"]),
        (4, "text", 4),
    ],
)
def test_a_word_is_read_in_the_notebook(notebook, word, read, value):
    """By the notebook's names alone, and evaluated once, or once more where it may stand in quotes."""
    notebook.shell.user_ns.update(name="first", text="name", own=len, names=["a", "b"], mse=1.5, every=20, blocks=[1])
    assert value == read_word(notebook.shell, word, read)


@pytest.mark.parametrize("read", ["text", "callable"])
def test_a_known_word_is_no_expression(notebook, read):
    """Whatever has its name in the notebook, but a callable where one is wanted."""
    notebook.shell.user_ns.update(mse="other")
    assert "mse" == read_word(notebook.shell, "mse", read, ["mse"])
    notebook.shell.user_ns.update(mse=len)
    assert {"text": "mse", "callable": len}[read] == read_word(notebook.shell, "mse", read, ["mse"])


def test_a_name_that_is_not_there(notebook):
    """With the nearest one."""
    notebook.shell.user_ns.update(rate=1)
    for read in ("value", "callable"):  # of an option that knows no words itself
        with pytest.raises(TaskError, match=r"'rat' is not defined in the notebook. Did you mean 'rate'"):
            read_word(notebook.shell, "rat", read)
    assert "rat" == read_word(notebook.shell, "rat", "callable", ["mse"])
