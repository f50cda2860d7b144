"""No false refusal: what trains as it was made also trains in other precisions.

    python tests/compatibility/precisions.py [MODEL ...]

Each model of the compatibility table and of the parity matrix takes one checked step on each mesh on which it is equal
to one process, in float64, float32, bfloat16 weights, and under autocast to bf16 and fp16. What plain PyTorch cannot do
in a precision is left out. A refusal is a fault, and so is a step that the check could not look at.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "core")]

import torch
import zoo
from case import converted
from cells import BATCH, CASES, MESHES, loss_of, optimizer_of, options_of, ranks_of, read
from problems import train
from table import EQUAL
from table import read as written

from nbdist.core.comm.world import World
from nbdist.errors import PlanError, TaskError

# A precision's name, the type of weights and numbers in the data, and the option.
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "float64": (torch.float64, "full"),
    "float32": (torch.float32, "full"),
    "bf16 weights": (torch.bfloat16, "full"),
    "bf16": (torch.float32, "bf16"),
    "fp16": (torch.float32, "fp16"),
}
ZOO = "zoo: "


def setting(name: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """A model of numbers of that type, one batch of data, and what else `train` takes."""
    if name.startswith(ZOO):
        case = zoo.CASES[name.removeprefix(ZOO)]
        return case.model(dtype), case.data(BATCH, dtype), {"loss": case.loss}
    case = CASES[name]
    model, data = case.model().to(dtype), with_loader(case.samples(BATCH), dtype)
    given = {"step": case.step} if case.step else {"loss": case.loss}
    return model, data, {"optimizer": optimizer_of(case), **given}


def with_loader(data: Any, dtype: torch.dtype) -> Any:
    """`converted`, also what a DataLoader collates."""
    if not isinstance(data, torch.utils.data.DataLoader):
        return converted(data, dtype)
    collate = data.collate_fn
    return torch.utils.data.DataLoader(
        data.dataset, batch_size=data.batch_size, collate_fn=lambda rows: converted(collate(rows), dtype)
    )


def plain_error(name: str, dtype: torch.dtype, precision: str) -> str:
    """What a step in plain PyTorch raises, or nothing."""
    model, data, _ = setting(name, dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    try:
        batch = read(data, torch.arange(BATCH))
        with torch.autocast("cpu", dtype=kind, enabled=precision != "full"):
            if name.startswith(ZOO):
                loss = zoo.CASES[name.removeprefix(ZOO)].loss(model(batch[0]), batch[1])
            else:
                loss = loss_of(CASES[name], model, batch)
        loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if loss.isfinite().all() else "a loss that is not finite"


def run_cell(world: World, name: str, mesh: str, precisions: list[str]) -> dict[str, str]:
    """What the check says of a model on a mesh in each precision. On one rank."""
    warnings.simplefilter("ignore")
    found = {}
    for precision in precisions:
        dtype, option = PRECISIONS[precision]
        model, data, given = setting(name, dtype)
        options = {"microbatches": 2} if "pp" in mesh else {}
        options |= {"strategy": mesh} if name.startswith(ZOO) else options_of(CASES[name], mesh)
        options |= {"batch_size": BATCH, "precision": option}
        try:
            result, _ = train(world, model, data, shuffle=False, **given, **options)
            found[precision] = result.plan.checked
        except (PlanError, TaskError) as error:
            found[precision] = f"REFUSED: {error}"
    return found


def main(chosen: list[str]) -> int:
    """Print what is refused or not checked; returns how many cells are."""
    from ranks import RankPool

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pool, began_s, faults, cells, left_out = RankPool(), time.perf_counter(), 0, 0, 0
    table = written() | {ZOO + name: dict.fromkeys(MESHES, EQUAL) for name in zoo.CASES}
    table[ZOO + "U-Net"]["tp=2"] = "convolutions alone"
    for name in chosen or table:
        errors = {p: plain_error(name, *PRECISIONS[p]) for p in PRECISIONS}
        left_out += sum(map(bool, errors.values()))
        for mesh in [mesh for mesh in MESHES if table[name][mesh] == EQUAL]:
            asked = [p for p in PRECISIONS if not errors[p]]
            try:
                found = pool(ranks_of(mesh), run_cell, name, mesh, asked)[0]
            except Exception as error:
                found = {"any": f"FAILS: {type(error).__name__}: {error}"}
            cells += len(found)
            for precision, text in found.items():
                if not text.startswith("loss") and (name.startswith(ZOO) or CASES[name].check == "yes"):
                    faults += 1
                    print(f"{name}, {mesh}, {precision}: {text}", flush=True)
        print(f"{name}: done, {time.perf_counter() - began_s:.0f} s; plain PyTorch fails: "
              f"{ {p: e.splitlines()[0][:80] for p, e in errors.items() if e} or 'never'}", flush=True)  # fmt: skip
    print(f"{cells} cells, {faults} faults, {left_out} precisions left out, {time.perf_counter() - began_s:.0f} s")
    return faults


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]) > 0)
