"""A run of the notebook as a plain Python script, for torchrun."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbdist.cluster.runs.run_spec import RUN_OPTIONS
from nbdist.notebook.cell_slice import Statement, names_in, sliced
from nbdist.notebook.step_cell import step_source

__all__ = ["Script", "TrainCall", "script_of"]

_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class TrainCall:
    """How a run was written in a cell.

    Args:
        model: The expression of MODEL.
        data: That of DATA.
        words: What was typed for each option.
        options: Their values.
        cell: The number of the cell.
        body: The step, as IPython has transformed it; empty without one.
    """

    model: str
    data: str
    words: Mapping[str, Any]
    options: Mapping[str, Any]
    cell: int
    body: str = ""

    def resumed(self, other: TrainCall) -> TrainCall:
        """The same run with some options changed: resumed, it has the numbers of one that was never interrupted."""
        ends = (
            ("epochs", "steps") if {"epochs", "steps"} & {k for k, v in other.options.items() if v is not None} else ()
        )
        kept = [name for name in self.options if name not in ends]
        changed = [name for name in other.options if name not in ("resume", "step")]
        return replace(
            self,
            words={name: self.words[name] for name in kept} | {name: other.words[name] for name in changed},
            options={name: self.options[name] for name in kept} | {name: other.options[name] for name in changed},
        )


@dataclass(frozen=True, kw_only=True)
class Script:
    """The parts of a script.

    Args:
        setup: What the cells have before the run.
        model: The expression of the model after that.
        data: That of the data.
        options: The expression of each option.
        imports: The names that its imports bind.
        names: All that the cells assign.
    """

    setup: str
    model: str
    data: str
    options: Mapping[str, str]
    imports: frozenset[str]
    names: frozenset[str]

    @property
    def arguments(self) -> str:
        """Those of `nbdist.train`."""
        return ", ".join([self.model, self.data, *(f"{name}={text}" for name, text in self.options.items())])

    @property
    def beginning(self) -> str:
        """All before the run, and the imports that the run itself needs."""
        own = {"Path": "from pathlib import Path", "torch": "import torch", "nbdist": "import nbdist"}
        return "".join(f"{line}\n\n" for name, line in own.items() if name not in self.imports) + self.setup

    def text(self, about: str, ranks: int, file_name: str, *, form: str, kept: Collection[str] = ()) -> str:
        """All of it.

        Args:
            about: What it is, a line.
            ranks: For how many processes it is.
            file_name: Its own, for the line that starts it.
            form: Whether the model is a "module", a "mapping" of several, or a "sequence" of them.
            kept: What it reads from a file beside it: "weights", "data", "val".
        """
        start, result = (name + "_" * (name in self.names) for name in ("start", "result"))
        files = 'Path(__file__).with_suffix("{}")'
        lines = [f'"""{about}', "", f"    torchrun --nproc-per-node {ranks} {file_name}", '"""', "", self.beginning]
        data, options = self.data, dict(self.options)
        if kept:
            lines += ["", "", "# What the cells do not make again, as it was when the run began."]
            lines.append(f"{start} = torch.load({files.format('.start.pt')})")
        if "weights" in kept:
            weights = f'{start}["weights"]'
            lines += {
                "mapping": [f"for key, module in {self.model}.items():", f"    module.load_state_dict({weights}[key])"],
                "sequence": [f"for module, weights in zip({self.model}, {weights}):",
                             "    module.load_state_dict(weights)"],
            }.get(form, [f"{self.model}.load_state_dict({weights})"])  # fmt: skip
        if "data" in kept:
            data = f'{start}["data"]'
        if "val" in kept:
            options["val"] = f'{start}["val"]'
        arguments = [self.model, data, *(f"{name}={text}" for name, text in options.items())]
        call = f"    {result} = nbdist.train({', '.join(arguments)})"
        if len(call) > _WIDTH or "\n" in call:
            call = "\n".join([f"    {result} = nbdist.train(", *(f"        {one}," for one in arguments), "    )"])
        state = {
            "mapping": f"{{key: module.state_dict() for key, module in {self.model}.items()}}",
            "sequence": f"[module.state_dict() for module in {self.model}]",
        }.get(form, f"{result}.model.state_dict()")
        lines += [
            "", "", 'if __name__ == "__main__":', call, "    if nbdist.rank() == 0:",
            f"        print({result}.history[-1])",
            f"        torch.save({state}, {files.format('.trained.pt')})",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"


def script_of(call: TrainCall, statements: Sequence[Statement], *, threads: int, device: str, careful: bool) -> Script:
    """The script of a run.

    Args:
        call: The run.
        statements: Of all cells before it.
        threads: Of each rank, on which bits depend.
        device: What ranks compute on, if it was chosen.
        careful: See `sliced`.

    Raises:
        PlanError: A name comes from a magic, or from none of the statements.
    """
    options = {
        name: _expression(call.words[name], value)
        for name, value in call.options.items()
        if value is not None and name in call.words and name not in RUN_OPTIONS
    }
    options.pop("rehearse", None)
    options.setdefault("threads", repr(threads))
    if device != "auto":
        options["device"] = f'"{device}"'
    step = ""
    if call.body:
        known = {name for one in statements for name in one.binds}
        name = "step" if "step" not in known else "train_step"
        step, options["step"] = step_source(call.body, name), name
    used = [
        *(text for name, text in options.items() if name != "step"),
        call.model,
        call.data,
        *([step] if step else []),
    ]
    names = {name for text in used for name in names_in(text)}
    needed = sliced(statements, names - {"nbdist"}, careful=careful)
    parts = _joined(needed)
    model = call.model
    if not model.isidentifier():
        model = "model" if "model" not in names else "trained_model"
        parts += f"\n\n{model} = {call.model}"
    if step:
        parts += f"\n\n\n{step}"
    return Script(
        setup=parts.strip("\n"), model=model, data=call.data, options=options,
        imports=frozenset(name for one in needed if one.imports for name in one.binds),
        names=frozenset(name for one in statements for name in one.binds),
    )  # fmt: skip


def _expression(word: Any, value: Any) -> str:
    """What stands in the script for an option: a number or a word itself, else what was typed."""
    if isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
    ):
        text = repr(value)
        return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text
    try:
        quoted = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return str(word)
    return quoted if isinstance(quoted, str) else str(word)


def _joined(statements: Sequence[Statement]) -> str:
    """The statements as a file has them: two blank lines around definitions, one between cells."""
    text = ""
    before: Statement | None = None
    for one in statements:
        if before is not None:
            defines = any(isinstance(each.node, (ast.FunctionDef, ast.ClassDef)) for each in (before, one))
            text += "\n\n\n" if defines else "\n\n" if one.cell != before.cell else "\n"
        text += textwrap.dedent(one.text)
        before = one
    return text
