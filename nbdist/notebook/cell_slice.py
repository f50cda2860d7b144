"""Which statements of a notebook's cells make what a run uses: a backward slice, as the source that was typed."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbdist.errors import PlanError

__all__ = ["Statement", "names_in", "sliced", "statements_of"]

_BODIES = ("time", "capture", "prun")
"""Cell magics whose body runs in the notebook, as it would without them."""
_SHOWS = ("print", "display", "len", "type", "repr", "help", "dir", "vars", "id", "isinstance", "summary")
_CHANGES = (
    "append", "extend", "insert", "update", "add", "pop", "remove", "sort", "load_state_dict", "train", "eval", "to",
    "apply", "add_module", "register_buffer", "register_parameter", "register_forward_hook", "register_hook", "float",
    "double", "half", "bfloat16", "compile", "add_param_group",
)  # fmt: skip
"""Methods that change what they are called on."""
_SETTINGS = (
    "manual_seed", "manual_seed_all", "seed", "seed_everything", "set_seed", "set_default_dtype", "set_default_device",
    "set_float32_matmul_precision", "use_deterministic_algorithms", "filterwarnings", "simplefilter",
)  # fmt: skip
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPOUND = (ast.For, ast.While, ast.If, ast.With, ast.Try)


@dataclass
class Statement:
    """A statement at the top of a cell.

    Args:
        node: As Python reads it.
        text: As it was typed, with the comments above it.
        cell: The number of the cell.
        last: Whether it is the last of its cell, whose value the notebook shows.
        binds: The names that it assigns.
        loads: The names that it reads when it runs.
        later: The names that functions in it read when they are called.
    """

    node: ast.stmt
    text: str
    cell: int
    last: bool
    binds: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)

    @property
    def imports(self) -> bool:
        """Whether it is an import."""
        return isinstance(self.node, (ast.Import, ast.ImportFrom))

    @property
    def replaces(self) -> bool:
        """Whether what a name had before is gone after it."""
        return not isinstance(self.node, (*_COMPOUND, ast.AugAssign, ast.Delete))


def statements_of(source: str, cell: int) -> list[Statement]:
    """The statements of a cell, as IPython has transformed it, without those that only IPython can run."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []  # it has never run
    body = tree.body
    if len(body) == 1 and (inner := _magic_body(body[0])) is not None:
        return statements_of(inner, cell)
    lines, found, before = source.splitlines(), list[Statement](), 0
    for node in body:
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        start = first - 1
        while start > before and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        if len(body) > 1 and any(node is not other and other.lineno == node.lineno for other in body):
            text = ast.unparse(node)  # several on a line
        else:
            text = "\n".join(lines[start : node.end_lineno])
        before = node.end_lineno or before
        statement = Statement(node, text, cell, node is body[-1])
        _Names(statement).visit(node)
        if "get_ipython" not in statement.loads or statement.binds:
            found.append(statement)
    return found


def names_in(expression: str) -> set[str]:
    """The names that an expression, or a function's source, takes from outside."""
    tree = ast.parse(expression)
    statement = Statement(ast.Pass(), expression, 0, False)
    for node in tree.body:
        _Names(statement).visit(node)
    return (statement.loads | statement.later) - statement.binds - set(dir(builtins))


def sliced(statements: Sequence[Statement], names: Iterable[str], *, careful: bool = False) -> list[Statement]:
    """The statements that make what the names stand for, after the last of them, in their order.

    Args:
        statements: Of all cells.
        names: What is used.
        careful: Whether to keep what may change it, and probably only shows or tests it, too.

    Raises:
        PlanError: A name comes from a magic, or from none of the statements.
    """
    known, modules = set(dir(builtins)), _modules(statements)
    kept: set[int] = set()
    waiting = [(name, len(statements), False) for name in sorted({*names})]
    seen: set[tuple[str, int]] = set()

    def keep(i: int) -> None:
        if i not in kept:
            kept.add(i)
            one = statements[i]
            waiting.extend((name, i, name in one.binds) for name in sorted(one.loads))
            waiting.extend((name, len(statements), False) for name in sorted(one.later))

    for i, one in enumerate(statements):
        if _is_setting(one, modules) or _imports_all(one):
            keep(i)
    while waiting:
        name, end, inside = waiting.pop()
        if (name, end) in seen or name in known:
            continue
        seen.add((name, end))
        makers = _makers(statements[:end], name)
        if not (makers or inside or any(_imports_all(one) for one in statements[:end])):
            raise PlanError(f"{name} is used by the run, and no cell of this notebook assigns it: assign it in a cell.")
        for i in makers:
            if "get_ipython" in statements[i].loads:
                raise PlanError(
                    f"{name} comes from a magic or a shell command, which a script has not: assign it in Python."
                )
            keep(i)
        for i in range(makers[-1] + 1, len(statements)) if makers and name not in modules else ():
            if name in statements[i].binds and statements[i].replaces:
                break
            if _changes(statements[i], name, modules, careful):
                keep(i)
    return [statements[i] for i in sorted(kept)]


def _makers(statements: Sequence[Statement], name: str) -> list[int]:
    """The last statement that binds a name, and those before it that it builds upon; the last one first."""
    found = []
    for i in reversed(range(len(statements))):
        if name in statements[i].binds:
            found.append(i)
            if statements[i].replaces:
                break
    return found


class _Names(ast.NodeVisitor):
    """Collects the names that a statement binds and reads, outside and inside of functions."""

    def __init__(self, statement: Statement) -> None:
        self._statement = statement
        self._local: list[set[str]] = []

    def visit_Name(self, node: ast.Name) -> None:
        """See `ast.NodeVisitor`."""
        if any(node.id in names for names in self._local):
            return
        if isinstance(node.ctx, ast.Load):
            (self._statement.later if self._local else self._statement.loads).add(node.id)
        elif not self._local:
            self._statement.binds.add(node.id)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """It reads what it assigns."""
        if isinstance(node.target, ast.Name) and not self._local:
            self._statement.loads.add(node.target.id)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        """See `ast.NodeVisitor`."""
        if not self._local:
            self._statement.binds |= {(a.asname or a.name).partition(".")[0] for a in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """See `ast.NodeVisitor`."""
        if not self._local:
            self._statement.binds |= {a.asname or a.name for a in node.names if a.name != "*"}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Its body runs with it; names that it assigns are its own."""
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        inner = Statement(node, "", 0, False)
        visitor = _Names(inner)
        for part in node.body:
            visitor.visit(part)
        reads = self._statement.later if self._local else self._statement.loads
        reads |= {name for name in inner.loads - inner.binds if not any(name in names for names in self._local)}
        self._statement.later |= inner.later - set().union(*self._local) if self._local else inner.later
        if not self._local:
            self._statement.binds.add(node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Its body runs when it is called; its decorators and defaults at once."""
        if not self._local:
            self._statement.binds.add(node.name)
        for part in node.decorator_list:
            self.visit(part)
        self._function(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """As a function."""
        self._function(node, [node.body])

    def _function(self, node: ast.FunctionDef | ast.Lambda, body: Sequence[ast.AST]) -> None:
        arguments = node.args
        for part in (*arguments.defaults, *(default for default in arguments.kw_defaults if default is not None)):
            self.visit(part)
        notes: list[Any] = [
            argument.annotation for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        ]
        for note in (*notes, getattr(node, "returns", None)):
            if note is not None:
                self.visit(note)
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        own = {argument.arg for argument in every if argument is not None}
        shared: set[str] = set()
        for inner in _own_scope(body):
            if isinstance(inner, (ast.Global, ast.Nonlocal)):
                shared |= set(inner.names)
            own |= _bound_by(inner)
        self._local.append(own - shared)
        for each in body:
            self.visit(each)
        self._local.pop()

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        own = {
            part.id for generator in node.generators for part in ast.walk(generator.target)
            if isinstance(part, ast.Name)
        }  # fmt: skip
        inner = Statement(ast.Pass(), "", 0, False)
        visitor = _Names(inner)
        visitor._local = list(self._local)
        visitor.generic_visit(node)
        self._statement.loads |= inner.loads - own
        self._statement.later |= inner.later - own

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension


def _bound_by(node: ast.AST) -> set[str]:
    """The names that a node of a function's body makes local."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return {node.id}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
        return {node.name}
    return set()


def _own_scope(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of a function's body, without those of functions and classes inside it."""
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_SCOPES, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)


def _modules(statements: Iterable[Statement]) -> set[str]:
    """The names that imports bind."""
    return {name for one in statements if one.imports for name in one.binds}


def _imports_all(one: Statement) -> bool:
    return isinstance(one.node, ast.ImportFrom) and any(alias.name == "*" for alias in one.node.names)


def _root(given: ast.AST) -> str:
    """The name that a chain of attributes, items and calls begins with."""
    node: Any = given
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        else:
            return ""
    return str(node.id)


def _targets(node: ast.AST) -> list[ast.expr]:
    """Attributes and items that a statement assigns."""
    targets = [*node.targets] if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
    return [target for target in targets if isinstance(target, (ast.Attribute, ast.Subscript))]


def _is_setting(one: Statement, modules: set[str]) -> bool:
    """Whether it sets something of a module, such as a seed or a default."""
    if isinstance(one.node, ast.Expr) and isinstance(one.node.value, ast.Call):
        function = one.node.value.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        paths = name in ("append", "insert") and ast.unparse(function).startswith("sys.path.")
        return (name in _SETTINGS or paths) and _root(function) in modules
    return any(_root(target) in modules for target in _targets(one.node))


def _changes(one: Statement, name: str, modules: set[str], careful: bool) -> bool:
    """Whether a statement may change what a name stands for, without assigning the name."""
    if name not in one.loads or "get_ipython" in one.loads:
        return False
    if any(_root(target) == name for target in _targets(one.node)):
        return True
    if isinstance(one.node, ast.Expr) and isinstance(one.node.value, ast.Call):
        function = one.node.value.func
        called = getattr(function, "id", getattr(function, "attr", ""))
        if _root(function) == name and (called in _CHANGES or called.endswith("_")):
            return True
        other = isinstance(function, ast.Attribute) and _root(function) not in modules  # a trainer's fit, say
        return called not in _SHOWS and (careful or not (one.last or other))
    if isinstance(one.node, _COMPOUND):
        parts = list(ast.walk(one.node))
        if any(isinstance(part, ast.Attribute) and part.attr == "backward" for part in parts):
            return careful  # a loop that trains: the weights that it leaves are kept otherwise
        return careful or any(
            _targets(part) or (isinstance(part, ast.Attribute) and part.attr.endswith("_")) for part in parts
        )
    return False


def _magic_body(node: ast.stmt) -> str | None:
    """The body of a cell magic that runs in the notebook; empty for other cell magics, None for what is none."""
    call = node.value if isinstance(node, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "run_cell_magic"):
        return None
    try:
        name, line, body = (ast.literal_eval(argument) for argument in call.args)
    except ValueError:
        return ""
    runs = name in _BODIES or (name == "dist" and "--local" in line.split())
    return body if runs else ""
