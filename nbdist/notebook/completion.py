"""Tab completion: options and values of the magics, and an engine's names inside a ``%%dist`` cell."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from typing import Any

from nbdist.cluster import Cluster, current_cluster
from nbdist.errors import NbdistError
from nbdist.notebook.parsers import LINE_OPTIONS, PARSERS, RUN_COMMANDS
from nbdist.plan.arguments import OptionParser, split_line
from nbdist.plan.mesh import AXES, STRATEGY_WORDS
from nbdist.telemetry import past_runs

__all__ = ["complete", "complete_line", "install", "remove"]

_LINE = re.compile(r"\s*(?:[\w.,\s]+=\s*)?(%{1,2}dist\w*)\s+(.*)$", re.DOTALL)
_TOKEN = re.compile(r"[\w.-]*$")  # what IPython takes for the word at the cursor
_LISTED_RUNS = 20


def install(shell: Any) -> None:
    """Let a shell complete the magics; before IPython 8.6, lines only."""
    try:
        from IPython.core.completer import SimpleCompletion, context_matcher
    except ImportError:  # before 8.6 a completer does not see the cell
        shell.set_hook("complete_command", _OldHook(shell), re_key=_LINE.pattern.replace("(.*)$", ""))
        return

    @context_matcher()
    def nbdist_matcher(context: Any) -> Any:
        found = complete(shell, context.full_text, context.cursor_line, context.cursor_position)
        if found is None:
            return {"completions": [], "suppress": False}
        token, texts = found
        return {
            "completions": [SimpleCompletion(text, type="nbdist") for text in texts],
            "matched_fragment": token,
            "ordered": True,
            "suppress": bool(texts),
        }

    shell.Completer.custom_matchers.append(nbdist_matcher)


def remove(shell: Any) -> None:
    """Undo `install`."""
    matchers = getattr(getattr(shell, "Completer", None), "custom_matchers", [])
    matchers[:] = [matcher for matcher in matchers if getattr(matcher, "__name__", "") != "nbdist_matcher"]


class _OldHook:
    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def __call__(self, completer: Any, event: Any) -> list[str]:
        found = complete_line(event.text_until_cursor, self._shell.user_ns)
        return [] if found is None else found[1]


def complete(shell: Any, text: str, line: int, column: int) -> tuple[str, list[str]] | None:
    """The completions at the cursor of a cell.

    Args:
        shell: The IPython shell.
        text: The cell.
        line: The cursor's line, from 0.
        column: Its place in the line.

    Returns:
        The word at the cursor, and its completions; None where the line is no magic of nbdist.
    """
    lines = text.split("\n")
    first = next((number for number, words in enumerate(lines) if words.strip()), 0)
    header = _LINE.match(lines[first] + " ")
    if line > first and header is not None and header[1] == "%%dist":
        return _on_engine(header[2], "\n".join([*lines[first + 1 : line], lines[line][:column]]))
    return complete_line(lines[line][:column], shell.user_ns)


def complete_line(line: str, names: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The completions at the end of a magic's line; see `complete`."""
    match = _LINE.match(line)
    if match is None or (parser := PARSERS.get(match[1])) is None:
        return None
    given = match[2]
    try:
        words = split_line(given)
    except NbdistError:  # inside a bracket or a quote, Python's own completer is right
        return None
    word = "" if not given or given[-1].isspace() else words.pop()
    token = _TOKEN.search(word)[0]  # type: ignore[index]  # it matches everywhere
    known = {name: value for name, value in names.items() if not name.startswith("_")}
    texts = _candidates(parser, words, word, known)
    if texts is None:
        return None
    before = word[: len(word) - len(token)]
    return token, [text[len(before) :] for text in texts if text.startswith(word)]


def _candidates(parser: OptionParser, words: list[str], word: str, names: dict[str, Any]) -> list[str] | None:
    actions = {flag: action for action in parser.arguments for flag in action.option_strings}
    if word.startswith("-"):
        return [flag for flag in actions if flag not in words or flag == word]
    positions = [action for action in parser.arguments if not action.option_strings]
    taken, last = 0, None
    for given in words:
        if given in actions:
            last = actions[given]
        elif last is not None and last.nargs != 0:
            last = last if last.nargs == "+" else None
        else:
            taken, last = taken + 1, None
    if last is not None and last.nargs != 0:
        dest = last.dest
    elif positions:
        many = positions[-1].nargs == "+"
        if taken >= len(positions) and not many:
            return [flag for flag in actions if flag not in words]
        dest = positions[min(taken, len(positions) - 1)].dest
    else:
        return [flag for flag in actions if flag not in words]
    values = _VALUES.get(dest)
    return None if values is None else values(names, word)


def _of(*kinds: str) -> Callable[[dict[str, Any], str], list[str]]:
    """Names of notebook objects of some torch types or their subclasses; runs no code of the objects."""

    def named(names: dict[str, Any], word: str) -> list[str]:
        return [name for name, value in names.items() if _is(value, *kinds)]

    return named


def _is(value: Any, *kinds: str) -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    classes = {"module": "nn.Module", "dataset": "utils.data.Dataset", "loader": "utils.data.DataLoader",
               "optimizer": "optim.Optimizer", "tensor": "Tensor"}  # fmt: skip
    return any(issubclass(type(value), _at(torch, classes[kind])) for kind in kinds)


def _at(module: Any, path: str) -> type:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _data(names: dict[str, Any], word: str) -> list[str]:
    numpy = sys.modules.get("numpy")

    def array(value: Any) -> bool:
        return _is(value, "tensor") or (numpy is not None and issubclass(type(value), numpy.ndarray))

    def fits(value: Any) -> bool:
        if type(value) in (tuple, list, dict):
            parts = list(value.values() if type(value) is dict else value)
            return 0 < len(parts) < 100 and all(map(array, parts))
        return _is(value, "dataset", "loader")

    return [name for name, value in names.items() if fits(value)]


def _or_functions(name: str, *kinds: str) -> Callable[[dict[str, Any], str], list[str]]:
    """The well-known words of an option, then the notebook's own functions and torch objects."""

    def named(names: dict[str, Any], word: str) -> list[str]:
        mine = [
            name
            for name, value in names.items()
            if (type(value) is types.FunctionType and value.__module__ == "__main__")
            or (kinds and _is(value, *kinds))
            or (name == "metric" and all(hasattr(type(value), word) for word in ("update", "compute")))
        ]
        return [*LINE_OPTIONS[name].words, *mine]

    return named


def _meshes(names: dict[str, Any], word: str) -> list[str]:
    """Strategy words, and every mesh of as many ranks as there are engines: first the axes that stand there already."""
    cluster = current_cluster()
    size = 0 if cluster is None else cluster.size
    typed = [axis for axis in re.findall("[a-z]+", word) if axis in AXES]
    axes = tuple(dict.fromkeys([*typed, *AXES]))
    meshes = [",".join(f"{axis}={degree}" for axis, degree in mesh) for mesh in _products(size, axes)]
    return [*STRATEGY_WORDS, *meshes]


def _products(size: int, axes: tuple[str, ...]) -> list[list[tuple[str, int]]]:
    """Every way to write `size` as a product of degrees above one, each of another axis."""
    if size < 2:
        return []
    found = []
    for number, axis in enumerate(axes):
        found.append([(axis, size)])
        for degree in range(2, size // 2 + 1):
            if size % degree == 0:
                found += [[(axis, degree), *rest] for rest in _products(size // degree, axes[number + 1 :])]
    return found


def _words(*words: str) -> Callable[[dict[str, Any], str], list[str]]:
    return lambda names, word: list(words)


def _numbers(names: dict[str, Any], word: str) -> list[str]:
    return [name for name, value in names.items() if type(value) in (int, float)]


def _magics(names: dict[str, Any], word: str) -> list[str]:
    return [name.lstrip("%") for name in PARSERS]


_VALUES: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    **{name: _words(*option.words) for name, option in LINE_OPTIONS.items() if option.words},
    **{name: _numbers for name, option in LINE_OPTIONS.items() if option.parse in (int, float)},
    **{name: _words("yes", "no") for name, option in LINE_OPTIONS.items() if option.parse is bool},
    "data": _data,
    "val": _data,
    "model": _of("module"),
    "strategy": _meshes,
    "loss": _or_functions("loss", "module"),
    "metric": _or_functions("metric"),
    "evaluate": _or_functions("evaluate"),
    "after_step": _or_functions("after_step"),
    "each_epoch": _or_functions("each_epoch"),
    "optimizer": _or_functions("optimizer", "optimizer"),
    "lr_scheduler": _or_functions("lr_scheduler"),
    "device": _words("auto", "cpu", "cuda"),
    "command": _words(*RUN_COMMANDS),
    "names": lambda names, word: list(names),
    "name": lambda names, word: _on_engine("", word.rpartition(".")[2])[1] if "." not in word else [],
    "run_id": lambda names, word: [run.run_id for run in past_runs(_LISTED_RUNS)],
    "magic": _magics,
}


def _on_engine(header: str, source: str) -> tuple[str, list[str]]:
    """The completions on the first of the cell's engines; none while it is busy."""
    cluster: Cluster | None = current_cluster()
    ranks = re.search(r"--ranks\s+(\d+)", header)
    if cluster is None:
        return "", []
    try:
        return cluster.complete(source, int(ranks[1]) if ranks else 0)
    except NbdistError:
        return "", []
