"""Cells of the compatibility table: a model on a mesh beside a plain loop in one process."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent.parent),
    str(Path(__file__).parent.parent / "core"),
]

import attention
import dynamic
import everyday
import generative
import losses
import own_steps
import science
import sequence
import vision
from case import Case
from problems import train
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nbdist.core.comm.world import World
from nbdist.core.process import rng
from nbdist.core.task import carried_state, step_updates
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan, slice_bounds

CASES: dict[str, Case] = {
    **everyday.CASES, **vision.CASES, **sequence.CASES, **attention.CASES, **dynamic.CASES, **generative.CASES,
    **science.CASES, **losses.CASES, **own_steps.CASES,
}  # fmt: skip
MESHES = ["dp=2", "shard=2", "pp=2", "tp=2", "dp=2,shard=2", "dp=2,pp=2"]
SAMPLES, BATCH, SEED = 34, 12, 3  # three steps, the last of 10 samples
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "l1": F.l1_loss}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "lbfgs": functools.partial(torch.optim.LBFGS, max_iter=4, history_size=5),
}


def ranks_of(mesh: str) -> int:
    """How many ranks a mesh has."""
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(","))


def optimizer_of(case: Case) -> Any:
    """What makes its optimizer, or each of a dict of several."""
    make = functools.partial(OPTIMIZERS[case.optimizer], lr=case.lr)
    model = case.model()
    return dict.fromkeys(model, make) if isinstance(model, dict) else make


def modules_of(model: Any) -> nn.Module:
    """The model, or several as one."""
    return nn.ModuleDict(model) if isinstance(model, dict) else model


def options_of(case: Case, mesh: str) -> dict[str, Any]:
    """How a cell is run."""
    options: dict[str, Any] = {"strategy": mesh, "seed": SEED, "batch_size": BATCH, "check": case.check}
    if case.reduction != "mean":
        options["reduction"] = case.reduction
    if case.ema is not None:
        options["ema"] = case.ema
    if "pp" in mesh:
        options["microbatches"] = 2
        if case.split_at:
            options["split_at"] = [case.split_at]
    return options


def run_cell(world: World, name: str, mesh: str) -> Any:
    """A model's mean loss and tensors on a mesh, and what the check found. On one rank."""
    warnings.simplefilter("ignore")
    case = CASES[name]
    model = case.model()
    result, _ = train(
        world, model, case.samples(samples_of(case)), shuffle=False, optimizer=optimizer_of(case),
        after_step=case.after, **({"step": case.step} if case.step else {"loss": case.loss}), **options_of(case, mesh),
    )  # fmt: skip
    averages = {f"average of {name}": tensor for name, tensor in result.average.items()}
    return result.history[-1]["loss"], _tensors(model) | averages, result.plan.checked


def by_hand(case: Case, mesh: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same steps in plain PyTorch, in one process; of the whole batch, or slice by slice if that matters."""
    options = options_of(case, mesh)
    del options["check"]
    plan = Plan.create(ranks=ranks_of(mesh), cores=1, **options)
    model, data, totals, weights = case.model(), case.samples(samples_of(case)), [], []
    make, modules = optimizer_of(case), modules_of(model)
    if isinstance(make, dict):
        return _with_updates(case, model, {name: make[name](module.parameters()) for name, module in model.items()})
    optimizer = make(model.parameters())
    average = None if case.ema is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(case.ema))
    if average is not None:
        average.update_parameters(model)  # it begins with the first weights
    replicas = [{k: v.clone() for k, v in modules.named_buffers()} for _ in range(plan.mesh.data if case.sliced else 1)]
    state: dict[str, Any] = {}
    for step, rows in enumerate(torch.arange(samples_of(case)).split(BATCH)):
        optimizer.zero_grad()
        total = 0.0
        slices = slice_bounds(len(rows), plan.slices) if case.sliced else [(0, len(rows))]
        for i, (start, stop) in enumerate(slices):
            buffers = replicas[i * len(replicas) // len(slices)]
            for name, buffer in model.named_buffers():
                buffer.data = buffers[name]
            torch.manual_seed(rng.derive(SEED, "slice", step, i))
            share = 1 if case.reduction == "sum" else (stop - start) / len(rows)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(carried_state, "_present", Carrying(state) if case.carries else None)
                loss = loss_of(case, model, read(data, rows[start:stop])) * share
            loss.backward()
            total += loss.item()

        def again(rows: torch.Tensor = rows) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(case, model, read(data, rows))
            loss.backward()
            return loss

        optimizer.step(again if case.optimizer == "lbfgs" else None)
        if case.after is not None:
            with torch.no_grad():
                case.after(model)
        if average is not None:
            average.update_parameters(model)
        totals.append(total)
        weights.append(case.weigh(read(data, rows)) if case.weigh else len(rows))
    tensors = _tensors(model)
    for name, buffer in replicas[0].items():
        tensors[name] = torch.stack([r[name] for r in replicas]).mean(0) if buffer.is_floating_point() else buffer
    if average is not None:
        tensors |= {f"average of {name}": p.detach() for name, p in average.module.named_parameters()}
    return sum(a * b for a, b in zip(totals, weights, strict=True)) / sum(weights), tensors


@dataclass
class Carrying:
    """What a loop of one process carries from batch to batch."""

    state: dict[str, Any]

    def values(self, first: Mapping[str, Any], over_epochs: bool) -> carried_state.Carried:
        """As `nbdist.carried` gives them."""
        for name, value in first.items():
            self.state.setdefault(name, value)
        return carried_state.Carried(self.state)


def samples_of(case: Case) -> int:
    """How many samples a case has; where values are carried, all batches are of one size."""
    return SAMPLES // BATCH * BATCH if case.carries else SAMPLES


def _with_updates(case: Case, model: Any, optimizers: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same steps in plain PyTorch, with several optimizers: one loss for all, or an update for each."""
    data, losses = case.samples(SAMPLES), []

    class Loop:
        def update(self, loss, name, weight, retain_graph):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward(retain_graph=retain_graph)
            optimizers[name].step()
            losses.append(loss.item() * self.samples / SAMPLES)

    loop = Loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_updates, "_present", loop)
        for step, rows in enumerate(torch.arange(SAMPLES).split(BATCH)):
            loop.samples = len(rows)
            torch.manual_seed(rng.derive(SEED, "slice", step, 0))
            loss = case.step(model, read(data, rows))
            if loss is None:
                continue
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item() * len(rows) / SAMPLES)
    return sum(losses), _tensors(model)


def read(data: Any, rows: torch.Tensor) -> Any:
    """Samples as one batch."""
    if isinstance(data, tuple):
        return [tensor[rows] for tensor in data]
    if isinstance(data, dict):
        return {name: tensor[rows] for name, tensor in data.items()}
    return data.collate_fn([data.dataset[i] for i in rows.tolist()])


def loss_of(case: Case, model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a batch."""
    if case.step is not None:
        loss = case.step(model, batch)
        return loss[0] if isinstance(loss, tuple) else loss
    if case.loss is None:
        output = model(**batch)
        return output["loss"] if isinstance(output, dict) else output.loss
    *inputs, target = batch
    loss = case.loss if callable(case.loss) else LOSSES[case.loss]
    if case.reduction == "sum":
        loss = functools.partial(loss, reduction="sum")
    return loss(model(*inputs), target)


@functools.cache
def _by_hand(name: str, mesh: str) -> tuple[float, dict[str, torch.Tensor]]:
    with torch.random.fork_rng():
        return by_hand(CASES[name], mesh)


def outcome(name: str, mesh: str, found: Any) -> str:
    """A cell's text: "equal", the sentence that refuses it, or a fault: what differs, or which error came."""
    if isinstance(found, str):
        return found
    case, (loss, tensors, _) = CASES[name], found
    expected_loss, expected = _by_hand(name, mesh if case.sliced else MESHES[0])
    assert expected.keys() == tensors.keys(), f"{expected.keys() ^ tensors.keys()}"
    tolerance = case.tolerance or (1e-9 if case.double else 2e-5)
    gaps = {"loss": _gap(torch.tensor(expected_loss), torch.tensor(loss))}
    gaps |= {key: _gap(tensor, tensors[key]) for key, tensor in expected.items()}
    wrong = {key: gap for key, gap in gaps.items() if not gap <= tolerance}
    return f"DIFFERS: {', '.join(f'{k} by {v:.1e}' for k, v in wrong.items())}" if wrong else "equal"


def _gap(expected: torch.Tensor, actual: torch.Tensor) -> float:
    assert expected.dtype == actual.dtype
    assert expected.shape == actual.shape
    kind = torch.complex128 if expected.is_complex() else torch.float64
    return (expected.to(kind) - actual.to(kind)).abs().max().item() if expected.numel() else 0.0


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    named = [*modules_of(model).named_parameters(), *modules_of(model).named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def row(pool: Any, name: str, meshes: Sequence[str]) -> dict[str, str]:
    """A model's cells on some meshes, whose ranks `pool` starts."""
    return {mesh: outcome(name, mesh, found_by(on_ranks, pool, run_cell, name, mesh)) for mesh in meshes}


def on_ranks(pool: Any, run_cell: Any, name: str, mesh: str) -> Any:
    """What rank 0 of a mesh finds, whose ranks `pool` starts."""
    return pool(ranks_of(mesh), run_cell, name, mesh)[0]


def found_by(run: Any, *arguments: Any) -> Any:
    """What a cell finds; the sentence that refuses it, or a fault's text, where it raises."""
    try:
        return run(*arguments)
    except (PlanError, TaskError) as error:
        return str(error)
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {error}"
