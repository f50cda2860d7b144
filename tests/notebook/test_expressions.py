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
        ("name", "text", "name"),
        ("name", "value", "first"),
        ("text", "value", "name"),
        ("text", "quotable", "first"),
        ("'1 + 1'", "quotable", 2),
        ("mse", "callable", "mse"),
        ("own", "callable", len),
    ],
)
def test_a_word_is_read_in_the_notebook(notebook, word, read, value):
    """By the notebook's names alone, and evaluated once, or once more where it may stand in quotes."""
    notebook.shell.user_ns.update(name="first", text="name", own=len)
    assert value == read_word(notebook.shell, word, read)


def test_a_name_that_is_not_there(notebook):
    """With the nearest one."""
    notebook.shell.user_ns.update(rate=1)
    with pytest.raises(TaskError, match=r"'rat' is not defined in the notebook. Did you mean 'rate'"):
        read_word(notebook.shell, "rat", "value")
