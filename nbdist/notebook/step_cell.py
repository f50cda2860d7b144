"""The body of a ``%%dist_train`` cell as a training step."""

from __future__ import annotations

import ast
import importlib
import symtable
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from nbdist.errors import PlanError

__all__ = ["compile_step", "step_source"]

_HOW = (
    "the cell body is one training step: it sees `model` and `batch`, and assigns `loss`, or calls nbdist.update for "
    "each of several"
)


def compile_step(shell: Any, line: str, cell: str, number: int) -> Callable[[Any, Any], Any]:
    """Compile a cell body into ``step(model, batch)``, which returns ``(loss, weight)``, or ``(loss, weight, log)``.

    A body that calls `nbdist.update` returns the log alone.

    It is an ordinary function over the notebook's namespace: names that the body assigns are local, names that it
    only reads are the notebook's globals. Tracebacks have the line numbers of the cell.

    Args:
        shell: The IPython shell.
        line: The rest of the magic's line.
        cell: The body.
        number: The cell's ``In[...]``.

    Raises:
        PlanError: The body is empty, is not Python, or does not assign `loss`, and updates nothing itself.
    """
    source = shell.transform_cell(cell)
    try:
        tree = ast.parse(source)
        compile(tree, "cell", "exec")  # refuses `return` and the like outside of a function
        names = symtable.symtable(source, "cell", "exec")
    except SyntaxError as error:
        raise _refusal(error, (error.lineno or 0) + 1) from None
    if not tree.body:
        raise PlanError(f"the cell is empty: {_HOW}.")
    updates = _updates(tree)
    if not (updates or _assigns(names, "loss")):
        raise PlanError(f"the cell does not assign `loss`: {_HOW}.")
    for name, line_number, adds in _read_before(tree, names, shell.user_ns):
        if adds:
            raise PlanError(
                f"line {line_number + 1} of the cell adds to {name} of the notebook, but the step runs on engines: "
                "leave it out, for run.history has the mean loss of each epoch, and means of other numbers if the cell "
                "assigns them to log, as in log = {'accuracy': accuracy}."
            )
        raise PlanError(
            f"the cell assigns {name}, so {name} is a local name of the step, and line {line_number + 1} of the cell "
            f"reads it before: call what is assigned by another name (new_{name} = ...); for what stays from step to "
            "step there is nbdist.carried."
        )
    if "nbdist" in names.get_identifiers():
        shell.user_ns.setdefault("nbdist", importlib.import_module("nbdist"))
    logs = _assigns(names, "log")
    frame = ast.parse(
        "def step(model, batch):\n    log = None\n    return log\n" if updates else
        "def step(model, batch):\n    weight = log = None\n    return loss, weight, log\n" if logs else
        "def step(model, batch):\n    weight = None\n    return loss, weight\n"
    )  # fmt: skip
    function = frame.body[0]
    assert isinstance(function, ast.FunctionDef)
    ast.increment_lineno(tree, 1)  # the magic's own line comes first
    function.body[1:1] = tree.body
    name = shell.compile.cache(f"%%dist_train {line}\n{cell}", number)
    try:
        code = compile(frame, name, "exec")
    except SyntaxError as error:  # only a module may contain it, such as a star import
        raise _refusal(error, error.lineno or 0) from None
    built: dict[str, Any] = {}
    exec(code, shell.user_ns, built)
    return built["step"]


def step_source(body: str, name: str) -> str:
    """A cell body that `compile_step` has accepted, as the source of a function ``step(model, batch)`` of some name."""
    tree, names = ast.parse(body), symtable.symtable(body, "cell", "exec")
    at_top = {
        target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
        if isinstance(target, ast.Name)
    }  # fmt: skip
    weight, log = (_assigns(names, given) for given in ("weight", "log"))
    first = [f"{given} = None" for given, used in (("weight", weight), ("log", log)) if used and given not in at_top]
    if _updates(tree):
        last = ["return log"] if log else []
    else:
        last = ["return loss" + (", weight" if weight else ", None" if log else "") + (", log" if log else "")]
    indented = textwrap.indent(body.strip("\n"), "    ")
    (function,) = ast.parse(f"def step():\n{indented}").body
    if ast.dump(ast.Module(getattr(function, "body"), [])) != ast.dump(tree):  # noqa: B009 - of a function
        indented = textwrap.indent(ast.unparse(tree), "    ")  # a text over several lines would be indented too
    lines = [f"def {name}(model, batch):", *(f"    {one}" for one in first), indented, *(f"    {one}" for one in last)]
    return "\n".join(lines)


def _assigns(names: symtable.SymbolTable, name: str) -> bool:
    """Whether the cell assigns a name; an import or a definition of that name is something else."""
    if name not in names.get_identifiers():
        return False
    symbol = names.lookup(name)
    return symbol.is_assigned() and not (symbol.is_imported() or symbol.is_namespace())


def _updates(tree: ast.Module) -> bool:
    """Whether the cell calls ``nbdist.update``, or ``update`` as it may be imported: then it needs no loss."""
    called = {ast.unparse(part.func) for part in ast.walk(tree) if isinstance(part, ast.Call)}
    return bool(called & {"nbdist.update", "update"})


def _read_before(tree: ast.Module, names: symtable.SymbolTable, known: Any) -> Iterator[tuple[str, int, bool]]:
    """Names of the notebook that the cell reads before it assigns them, with the line, and whether it adds to them.

    Of the cell's own statements, the first only.

    Statements with others inside them are passed over from there on: whether they run first is not known.
    """
    local = {s.get_name() for s in names.get_symbols() if s.is_assigned() and s.get_name() in known}
    assigned = {"model", "batch", "weight"}
    for statement in tree.body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)):
            return
        found = [part for part in ast.walk(statement) if isinstance(part, ast.Name)]
        if any(isinstance(part, (ast.Lambda, ast.comprehension, ast.NamedExpr)) for part in ast.walk(statement)):
            found = [name for name in found if isinstance(name.ctx, ast.Store)]
        added = isinstance(statement, ast.AugAssign)
        for name in found:
            if (isinstance(name.ctx, ast.Load) or added) and name.id in local - assigned:
                yield name.id, name.lineno, added
        assigned |= {name.id for name in found if isinstance(name.ctx, ast.Store)}


def _refusal(error: SyntaxError, line: int) -> PlanError:
    return PlanError(f"{error.msg} (line {line} of the cell): {_HOW}.")
