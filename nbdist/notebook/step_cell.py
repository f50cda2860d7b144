"""The body of a ``%%dist_train`` cell as a training step."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Callable
from typing import Any

from nbdist.errors import PlanError

__all__ = ["compile_step"]

_HOW = "the cell body is one training step: it sees `model` and `batch`, and assigns `loss`"


def compile_step(shell: Any, line: str, cell: str) -> Callable[[Any, Any], Any]:
    """Compile a cell body into ``step(model, batch)``, which returns ``(loss, weight)``.

    It is an ordinary function over the notebook's namespace: names that the body assigns are its own, names that it
    only reads are the notebook's. Lines in tracebacks are those of the cell.

    Args:
        shell: The IPython shell.
        line: What follows the magic on its line.
        cell: The body.

    Raises:
        PlanError: The body is empty, is not Python, or does not assign `loss`.
    """
    source = shell.transform_cell(cell)
    try:
        tree = ast.parse(source)
        compile(tree, "cell", "exec")  # refuses `return` and the like outside of a function
        names = symtable.symtable(source, "cell", "exec")
    except SyntaxError as error:
        place = f"line {(error.lineno or 0) + 1} of the cell"
        raise PlanError(f"{error.msg} ({place}): {_HOW}.") from None
    if not tree.body:
        raise PlanError(f"the cell is empty: {_HOW}.")
    if "loss" not in names.get_identifiers() or not names.lookup("loss").is_assigned():
        raise PlanError(f"the cell does not assign `loss`: {_HOW}.")
    frame = ast.parse("def step(model, batch):\n    weight = None\n    return loss, weight\n")
    function = frame.body[0]
    assert isinstance(function, ast.FunctionDef)
    ast.increment_lineno(tree, 1)  # the magic's own line comes first
    function.body[1:1] = tree.body
    name = shell.compile.cache(f"%%dist_train {line}\n{cell}", shell.execution_count)
    code = compile(frame, name, "exec")
    built: dict[str, Any] = {}
    exec(code, shell.user_ns, built)
    return built["step"]
