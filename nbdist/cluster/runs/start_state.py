"""What a run began with, for a script that repeats it: kept if it is small, compared with what the script makes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RUN_OPTIONS
from nbdist.core.task.fingerprint import fingerprint, state_of
from nbdist.core.task.task import Task
from nbdist.errors import PlanError

__all__ = ["keep_start", "parts_to_keep", "save_start"]

_MOST_WEIGHTS, _MOST_DATA = 32 * 2**20, 256 * 2**20
_PROGRAM = """{setup}


def _arguments(model, data, *, device="auto", **options):
    return model, data, options


if __name__ == "__main__":
    from nbdist.core.task.fingerprint import write_fingerprint

    write_fingerprint({path!r}, *_arguments({call}), **{size!r})
"""
_IGNORED = ("mesh", "strategy", "checked", "rehearse", "checkpoint", "resume", "tensorboard")
"""Options of a plan that change no number of the result, or follow from the number of ranks."""


def keep_start(task: Task) -> Any:
    """A copy of the weights that a run begins with; None if they are large, or lie in files. Local."""
    tensors = (*task.model.parameters(), *task.model.buffers())
    if task.in_file or sum(tensor.nbytes for tensor in tensors) > _MOST_WEIGHTS:
        return None
    return _copied(state_of(task.given))


def parts_to_keep(control: RunControl, setup: str, call: str) -> frozenset[str]:
    """Run the beginning of a script in another process, and compare what it would train with what the run trained.

    Args:
        control: The run, not forgotten.
        setup: The script before its run.
        call: The arguments of `nbdist.train` in it, as source.

    Returns:
        Of "weights", "data" and "val" those that the script does not make again, and that can be kept for it.

    Raises:
        PlanError: It fails, or makes something else that cannot be kept.
    """
    arguments = {name: value for name, value in control.arguments.items() if name not in ("names", *RUN_OPTIONS)}
    model, data = arguments.pop("model"), arguments.pop("data")
    names, plan = control.arguments["names"], control.spec.plan
    size = {"ranks": plan.mesh.size, "cores": plan.mesh.size * plan.threads}
    arguments = {name: value for name, value in arguments.items() if name != "resume"} | {"threads": plan.threads}
    own = fingerprint(model, data, arguments, **size, weights=control.start)
    found = _run(setup, call, size)
    differing = [name for name, value in own["plan"].items() if name not in _IGNORED and found["plan"][name] != value]
    if differing:
        name = differing[0]
        raise PlanError(f"the script would train with {name}={found['plan'][name]}, the run had {own['plan'][name]}.")
    if found["model"] != own["model"]:
        raise PlanError(
            f"the cells make another {names[0]} than the run trained: it was changed where the script cannot see it "
            "(in a magic, or by hand): change it in a cell of its own, and train again."
        )
    kept = set[str]()
    if found["weights"] != own["weights"]:
        if control.start is None:
            raise PlanError(
                f"the weights of {names[0]} at the start of the run are not those that the cells make, and too large "
                "to be kept: call torch.manual_seed(0) where they are made, and train again."
            )
        kept.add("weights")
    for part, name, given in (("data", names[1], data), ("val", "val", arguments.get("val"))):
        if found[part] != own[part]:
            if _plain(given) is None:
                raise PlanError(
                    f"{name} has other samples each time that its cells run: give them a seed "
                    "(torch.manual_seed(0), np.random.default_rng(0)), and train again."
                )
            kept.add(part)
    return frozenset(kept)


def save_start(path: Path, control: RunControl, kept: Collection[str]) -> None:
    """Write parts of what a run began with into a file, for ``torch.load``."""
    given = {"data": control.arguments["data"], "val": control.arguments.get("val")}
    parts = {name: control.start if name == "weights" else _plain(given[name]) for name in sorted(kept)}
    torch.save(parts, path)


def _run(setup: str, call: str, size: Mapping[str, int]) -> dict[str, Any]:
    """The fingerprint that a script makes; it is run beside the notebook, as its modules are there."""
    handle, program = tempfile.mkstemp(prefix=".nbdist-", suffix=".py", dir=os.getcwd())
    with tempfile.TemporaryDirectory() as folder, open(handle, "w") as file:
        try:
            found = Path(folder) / "fingerprint.json"
            file.write(_PROGRAM.format(setup=setup, call=call, path=str(found), size=dict(size)))
            file.flush()
            ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
            if ended.returncode or not found.exists():
                lines = [line for line in ended.stderr.splitlines() if line.strip()]
                raise PlanError(
                    f"the script would fail before it trains: {lines[-1] if lines else f'exit {ended.returncode}'}"
                )
            return dict(json.loads(found.read_text()))
        finally:
            os.unlink(program)


def _copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else copy.deepcopy(state)


def _plain(given: Any) -> Any:
    """Data that are tensors or arrays, as tensors; None for others, and for large ones."""
    parts = given if isinstance(given, (tuple, list)) else given.values() if isinstance(given, Mapping) else [given]
    try:
        tensors = [torch.as_tensor(part) for part in parts]
    except (TypeError, ValueError, RuntimeError):
        return None
    if not tensors or sum(tensor.nbytes for tensor in tensors) > _MOST_DATA:
        return None
    return (
        dict(zip(given, tensors, strict=True))
        if isinstance(given, Mapping)
        else (tuple(tensors) if isinstance(given, (tuple, list)) else tensors[0])
    )
