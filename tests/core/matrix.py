"""The parity matrix: every model on every mesh, beside one process that is written by hand.

``make parity`` prints it whole; `test_matrix.py` runs a part of it.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from problems import train
from zoo import CASES, Case

from nbdist.core.comm.world import World
from nbdist.core.process import rng
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh, Plan, slice_bounds

MESHES = [
    "dp=1", "dp=2", "dp=3", "dp=4", "pp=2", "pp=4", "tp=2", "shard=2", "shard=4", "dp=2,pp=2", "dp=2,tp=2",
    "pp=2,tp=2", "dp=2,shard=2", "shard=2,pp=2",
]  # fmt: skip
OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1, eps=1e-3),
}
ACCUMULATE = (1, 3)
EXACT = 1e-10  # in float64, which holds 16 digits; in float32 see `Case.rounding`
STEPS, BATCH, LAST = 5, 24, 18
SEED = 3


def plan_for(mesh: str, accumulate: int) -> Plan:
    """How a cell is run."""
    strategy = Mesh.parse(mesh, ranks_of(mesh))
    more = {"microbatches": 2} if strategy.pp > 1 else {}
    return Plan.create(
        ranks=ranks_of(mesh), cores=1, strategy=mesh, accumulate=accumulate, batch_size=BATCH, seed=SEED, **more
    )


def by_hand(
    case: Case, dtype: torch.dtype, optimizer: str, plan: Plan, device: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """Five steps in plain PyTorch, in one process: each replica's slices with random numbers of their own.

    The replicas share the weights; each has buffers of its own, whose mean is what the trained model holds.
    """
    model = case.model(dtype).to(device)
    x, y = (tensor.to(device) for tensor in case.data(BATCH * (STEPS - 1) + LAST, dtype))
    replicas = [{name: buffer.clone() for name, buffer in model.named_buffers()} for _ in range(plan.mesh.data)]
    made = OPTIMIZERS[optimizer](model.parameters())
    weighted = 0.0
    for step, batch in enumerate(torch.arange(len(x), device=device).split(BATCH)):
        made.zero_grad()
        total = 0.0
        for i, (start, stop) in enumerate(slice_bounds(len(batch), plan.slices)):
            if start == stop:
                continue
            buffers = replicas[i // plan.slices_per_rank]
            for name, buffer in model.named_buffers():
                buffer.data = buffers[name]
            torch.manual_seed(rng.derive(SEED, "slice", step, i))
            rows = batch[start:stop]
            loss = case.loss(model(x[rows]), y[rows]) * (len(rows) / len(batch))
            loss.backward()
            total += loss.item()
        made.step()
        weighted += total * len(batch) / len(x)
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, buffer in replicas[0].items():
        floating = buffer.is_floating_point()
        weights[name] = torch.stack([r[name] for r in replicas]).mean(0) if floating else buffer
    return weighted, {name: tensor.cpu() for name, tensor in weights.items()}


def run_cell(world: World, model: str, mesh: str, dtype: torch.dtype) -> Any:
    """Every optimizer and accumulation of a cell, on one rank: mean loss and weights; or why it is not possible."""
    warnings.simplefilter("ignore")
    case, results = CASES[model], {}
    for optimizer, accumulate in itertools.product(OPTIMIZERS, ACCUMULATE):
        plan, net = plan_for(mesh, accumulate), case.model(dtype)
        try:
            result, _ = train(
                world, net, case.data(BATCH * (STEPS - 1) + LAST, dtype), loss=case.loss, strategy=mesh, seed=SEED,
                optimizer=OPTIMIZERS[optimizer], accumulate=accumulate, batch_size=BATCH, shuffle=False,
                microbatches=plan.microbatches,
            )  # fmt: skip
        except (PlanError, TaskError) as error:
            return str(error)
        tensors = {name: tensor.detach() for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
        results[optimizer, accumulate] = result.history[-1]["loss"], tensors
    return results


def difference(model: str, mesh: str, dtype: torch.dtype, results: Any, device: str = "cpu") -> float:
    """The largest difference of a loss or a weight from the loop written by hand, over a cell's trainings."""
    largest = 0.0
    for (optimizer, accumulate), (loss, tensors) in results.items():
        expected_loss, expected = _reference(model, dtype, optimizer, plan_for(mesh, accumulate), device)
        assert expected.keys() == tensors.keys()
        largest = max(largest, abs(expected_loss - loss))
        for name, tensor in expected.items():
            assert tensor.dtype == tensors[name].dtype
            assert tensor.shape == tensors[name].shape
            gap = (tensor.double() - tensors[name].double()).abs().max().item() if tensor.numel() else 0.0
            largest = max(largest, gap) if gap == gap else float("inf")
    return largest


_references: dict[Any, Any] = {}


def _reference(model: str, dtype: torch.dtype, optimizer: str, plan: Plan, device: str) -> Any:
    key = model, dtype, optimizer, plan.mesh.data, plan.slices_per_rank, device
    if key not in _references:
        with torch.random.fork_rng():
            _references[key] = by_hand(CASES[model], dtype, optimizer, plan, device)
    return _references[key]


def ranks_of(mesh: str) -> int:
    """How many ranks a mesh has."""
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(","))


def main(models: list[str], meshes: list[str]) -> int:
    """Print the matrix; returns how many cells fail."""
    from ranks import RankPool

    torch.set_num_threads(1)
    pool, began_s, failed = RankPool(), time.perf_counter(), 0
    reasons: list[str] = []
    print(f"{STEPS} steps, {len(OPTIMIZERS)} optimizers x accumulate {ACCUMULATE}: largest difference from one process")
    print(f"{'':20}" + "".join(f"{mesh:>22}" for mesh in ("float64", "float32")))
    for mesh in meshes:
        for model in models:
            cells = []
            for dtype, tolerance in {torch.float64: EXACT, torch.float32: CASES[model].rounding}.items():
                try:
                    first, *_ = pool(ranks_of(mesh), run_cell, model, mesh, dtype)
                except Exception as error:
                    failed += 1
                    cells.append("FAILED")
                    reasons.append(f"{model} on {mesh}: {type(error).__name__}: {error}")
                    continue
                if isinstance(first, str):
                    if first not in reasons:
                        reasons.append(first)
                    cells.append(f"not possible ({reasons.index(first) + 1})")
                    continue
                gap = difference(model, mesh, dtype, first)
                failed += gap > tolerance
                cells.append(f"{'equal' if gap <= tolerance else 'UNEQUAL'} {gap:.0e}")
            print(f"{mesh:14}{model:20}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    for i, reason in enumerate(reasons, start=1):
        print(f"({i}) {reason}")
    print(f"{len(models) * len(meshes)} cells, {failed} failed, {time.perf_counter() - began_s:.0f} s")
    return failed


if __name__ == "__main__":
    chosen = sys.argv[1:]
    raise SystemExit(
        main([m for m in CASES if m in chosen] or [*CASES], [m for m in MESHES if m in chosen] or MESHES) > 0
    )
