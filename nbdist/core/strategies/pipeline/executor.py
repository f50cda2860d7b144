"""The pipeline executor: runs a schedule on one rank, one stage and microbatch at a time.

Activations and gradients are sent over point-to-point links with their shapes, so batches may differ in size. The
random generators' state is sent with them: a microbatch draws the numbers that it would draw in one process.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nbdist.core.comm import Link
from nbdist.core.data.reader import Slice, to_device
from nbdist.core.optim.precision import Precision
from nbdist.core.process import rng
from nbdist.core.strategies.pipeline.capture_call import capture_call, forward_replaced
from nbdist.core.strategies.pipeline.gradient_fusion import GradientFusion
from nbdist.core.strategies.pipeline.partition import Call, Split, output_structure
from nbdist.core.strategies.pipeline.schedules import Action, schedule_actions, surrogate_loss
from nbdist.core.strategies.pipeline.step_gradients import StepGradients
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.sync.sync_batchnorm import BatchNorms, buffers_kept_if_empty
from nbdist.core.task.task import Task
from nbdist.errors import TaskError
from nbdist.plan import Plan
from nbdist.telemetry import Work

__all__ = ["Pipeline"]

T = TypeVar("T")


@dataclass(kw_only=True)
class _Activations:
    """The activations that one stage holds for one microbatch between forward and backward."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Pipeline:
    """This rank's stages, and their forwards and backwards.

    Args:
        task: See `Strategy`.
        plan: See `Strategy`.
        split: The model in stages; stage s is on rank s mod ranks of the ``pp`` axis.
        rank: This rank's coordinate on ``pp``.
        before, after: Links to the neighbours on ``pp``, in a ring.
        device: This rank's device.
        precision: The autocast of forwards.
        shards: Shards this rank's parameters, with no block over stages of two ranks; None without a shard axis.
        batch_norms: Synchronizes BatchNorm statistics over the replicas, or None.
        dry_run: Context for tracing a stage on this rank alone.
        guarded: Context for the user's step.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        split: Split,
        rank: int,
        before: Link,
        after: Link,
        device: torch.device,
        precision: Precision,
        *,
        shards: FullySharded | None = None,
        batch_norms: BatchNorms | None = None,
        dry_run: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        guarded: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._task, self._plan, self._split = task, plan, split
        self._device, self._precision, self._shards = device, precision, shards
        self._batch_norms, self._dry_run, self._guarded = batch_norms, dry_run, guarded
        self._fusion = GradientFusion() if shards is None and plan.slices_per_rank > 1 else None
        self._stages = range(rank, plan.stages, plan.mesh.pp)
        self._parameters = {
            stage: [p for name, p in task.model.named_parameters() if stage in split.holders[name]]
            for stage in self._stages
        }
        self._blocks = {
            stage: [] if shards is None else [b for b in shards.blocks if not {*own}.isdisjoint(b.parameters)]
            for stage, own in self._parameters.items()
        }
        self._mail = {-1: _Mailbox(before), 1: _Mailbox(after)}
        if before is after:  # two ranks
            self._mail[1] = self._mail[-1]
        self._last = plan.stages - 1
        self._step_gradients = StepGradients(plan.mesh)
        self.schedule = schedule_actions(plan.schedule, plan.mesh.pp, plan.slices_per_rank)[rank]
        self.computes_loss = self._last in self._stages
        self._activations: dict[tuple[int, int], _Activations] = {}
        self.work: list[Work] = []

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """Run one slice through all stages, for evaluation. **Collective** over a replica."""
        result = None
        for stage in self._stages:
            result = self.run_forward(Action("forward", stage, 0), part, path, function)
        self._activations.clear()
        return result

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]
    ) -> T | None:
        """See `Strategy.run_forward`."""
        stage = action.stage
        batch: Any = None
        if stage in (0, self._last):
            batch = to_device(part.batch, self._device)
        if stage == 0:
            start_s = time.time()
            self._seed(part, path)
            with self._guarded(), self._precision.autocast():
                captured = capture_call(self._task.model, functools.partial(function, batch, part))
                call, inputs = Call.of(*captured)
        else:
            (text, requires_grad), (inputs, state) = self._receive("forward", action, stage - 1)
            call = Call.from_text(text)
            start_s = time.time()
            for tensor, required in zip(inputs, requires_grad, strict=True):
                tensor.requires_grad_(required and torch.is_grad_enabled())
            rng.set_state(state, self._device)
        with self._dry_run():
            module: Any = self._split.stage(stage, call)
            if self._fusion is not None:
                module = self._fusion.fused(module)
        graph = (self._task.loss_graph() if stage == self._last else None) or contextlib.nullcontext()
        with (
            buffers_kept_if_empty(self._task.model, part, self._batch_norms),
            graph,
            self._gathered(stage),
            self._precision.autocast(),
            self._split.computing(),
        ):
            outputs = module(*inputs)
        if stage < self._last:
            self._activations[stage, action.microbatch] = _Activations(inputs=inputs, outputs=list(outputs))
            self._record_work("forward", action, start_s)
            state = rng.get_state(self._device)
            requires_grad = [tensor.requires_grad for tensor in outputs]
            self._send("forward", action, 1, (call.to_text(), requires_grad), list(outputs), state)
            return None
        self._activations[stage, action.microbatch] = _Activations(inputs=inputs, outputs=[])
        state = rng.get_state(self._device)
        calls = 0

        def stage_outputs(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise TaskError("the step calls model(...) twice: a pipeline runs one call per step, so call it once.")
            rng.set_state(state, self._device)
            output_structure(module).set_attributes()
            return self._step_gradients.connect((args, kwargs), outputs)

        self._seed(part, path)  # as on the first stage: the step draws the same numbers before it calls the model
        with (
            graph,
            self._guarded(),
            self._precision.autocast(),
            forward_replaced(self._task.model, stage_outputs),
            self._step_gradients.refused(inputs),
        ):
            result = function(batch, part)
        self._record_work("forward", action, start_s)
        return result

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy.run_backward`."""
        saved = self._activations.pop((action.stage, action.microbatch))
        if loss is None:
            unwanted, (gradients, _) = self._receive("backward", action, action.stage + 1)
            start_s = time.time()
            loss = surrogate_loss(saved.outputs, gradients)
        else:
            start_s = time.time()
        if self._shards is not None:
            self._shards.run_backward(loss, unwanted, self._blocks[action.stage])
        elif loss.requires_grad and not unwanted:
            loss.backward() if self._fusion is None else self._fusion.backward(loss)
        saved.outputs.clear()
        self._record_work("backward", action, start_s)
        if action.stage > 0:
            self._send("backward", action, -1, unwanted, [tensor.grad for tensor in saved.inputs], [])

    def _seed(self, part: Slice, path: tuple[Any, ...]) -> None:
        rng.seed_torch(rng.derive_slice(self._plan.seed, path, part.index), self._device)

    def _record_work(self, kind: str, action: Action, start_s: float) -> None:
        if torch.is_grad_enabled():  # not in evaluation
            self.work.append(Work(kind, action.stage, action.microbatch, start_s, time.time()))

    @contextlib.contextmanager
    def _gathered(self, stage: int) -> Iterator[None]:
        """Context in which the parameters of a stage are gathered."""
        for block in self._blocks[stage]:
            block.gather()
        yield
        for block in self._blocks[stage]:
            block.free()

    def _send(
        self, kind: str, action: Action, step: int, note: Any, tensors: list[Any], state: list[torch.Tensor | None]
    ) -> None:
        """Send to the rank of the next stage (`step` 1) or of the previous one (-1)."""
        key = (kind, action.stage + step, action.microbatch)
        self._mail[step].send(key, (note, len(tensors)), [*tensors, *state])

    def _receive(self, kind: str, action: Action, source: int) -> tuple[Any, tuple[list[Any], list[Any]]]:
        key = (kind, action.stage, action.microbatch)
        (note, count), tensors = self._mail[source - action.stage].receive(key)
        return note, (tensors[:count], tensors[count:])


class _Mailbox:
    """A link whose messages are received by key: two neighbours may run their actions in different orders."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: dict[Any, Any] = {}

    def send(self, key: Any, note: Any, tensors: list[torch.Tensor | None]) -> None:
        self._link.send((key, note), tensors)

    def receive(self, key: Any) -> tuple[Any, list[Any]]:
        while key not in self._waiting:
            (other, note), tensors = self._link.receive()
            self._waiting[other] = note, tensors
        found: tuple[Any, list[Any]] = self._waiting.pop(key)
        return found
