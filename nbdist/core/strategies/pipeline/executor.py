"""A pipeline's executor: works through a schedule, one stage and microbatch at a time.

Tensors travel over links, so a batch of any size passes. The state of the random generators travels with them: a
microbatch draws the numbers that it would draw in one process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nbdist.core.comm import Link
from nbdist.core.data.reader import Slice, to_device
from nbdist.core.optim.precision import Precision
from nbdist.core.process import rng
from nbdist.core.strategies.pipeline.model_call import call_of, forward_replaced
from nbdist.core.strategies.pipeline.partition import Call, Split
from nbdist.core.strategies.pipeline.schedules import Action, order, scalar
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.sync.sync_batchnorm import BatchNorms, buffers_kept_if_empty
from nbdist.core.task.task import Task
from nbdist.errors import TaskError
from nbdist.plan import Plan
from nbdist.telemetry import Work

__all__ = ["Pipeline"]

T = TypeVar("T")


@dataclass(kw_only=True)
class _Passage:
    """What one stage keeps of one microbatch between forward and backward."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    silent: bool = False  # its gradient counts for nothing, but others wait for it to be computed


class Pipeline:
    """This rank's stages, and what passes through them.

    Args:
        task: What is trained.
        plan: How.
        split: The model in stages; stage s lies on rank s mod ranks of the ``pp`` axis.
        rank: This rank's coordinate on ``pp``.
        before, after: Links to the neighbours on ``pp``, in a ring.
        device: Where it computes.
        precision: What forward computes in.
        scaled: Turns a loss and its weight into what backward starts from.
        units: See `Strategy`.
        shards: What deals this rank's parameters out, no block over two ranks' stages; None where nothing does.
        batch_norms: What lets BatchNorm see the slices of all replicas; None where nothing does.
        rehearsed: Around the recording of a stage, in which other ranks take no part.
        guarded: Around the user's step.
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
        scaled: Callable[[torch.Tensor, Any], torch.Tensor],
        units: Callable[..., Any],
        shards: FullySharded | None = None,
        batch_norms: BatchNorms | None = None,
        dry_run: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        guarded: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._task, self._plan, self._split = task, plan, split
        self._device, self._precision, self._shards = device, precision, shards
        self._scaled, self._units = scaled, units
        self._batch_norms, self._rehearsed, self._guarded = batch_norms, dry_run, guarded
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
        self._orders = order(plan.schedule, plan.mesh.pp, plan.slices_per_rank)[rank]
        self._passages: dict[tuple[int, int], _Passage] = {}
        self.work: list[Work] = []

    def forward_backward(
        self, slices: list[Slice], path: tuple[Any, ...]
    ) -> tuple[Any, list[tuple[torch.Tensor, Any]]]:
        """Run the schedule over this step's microbatches; gradients add up. **Collective** over a replica."""
        self.work = []
        total: Any = 0
        losses: list[tuple[torch.Tensor, Any]] = []
        for action in self._orders:
            if action.microbatch >= len(slices):
                continue
            part = slices[action.microbatch]
            if action.kind == "forward":
                result = self._forward(action, part, path, self._task.loss_and_weight)
                if result is not None:
                    loss, weight = result
                    counts = bool(part.samples) and weight != 0
                    units = self._units(weight if counts else 0, part, first=action.microbatch == 0)
                    self._close_loss(action, loss, units if counts else 0)
                    if counts:
                        total = total + units
                        losses.append((loss.detach(), weight))
            else:
                self._backward(action)
        if not slices and self._last in self._stages:
            self._units(0, None)
        return total, losses

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """Pass one slice through, for evaluation. **Collective** over a replica."""
        result = None
        for stage in self._stages:
            result = self._forward(Action("forward", stage, 0), part, path, function)
        self._passages.clear()
        return result

    def _forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]
    ) -> T | None:
        stage = action.stage
        batch: Any = None
        if stage in (0, self._last):
            batch = to_device(part.batch, self._device)
        if stage == 0:
            start_s = time.time()
            self._seed(part, path)
            with self._guarded(), self._precision.autocast():
                call, inputs = Call.of(*call_of(self._task, batch))
        else:
            (text, wanted), (inputs, state) = self._receive("forward", action, stage - 1)
            call = Call.from_text(text)
            start_s = time.time()
            for tensor, wants in zip(inputs, wanted, strict=True):
                tensor.requires_grad_(wants and torch.is_grad_enabled())
            rng.set_state(state, self._device)
        with self._rehearsed():
            module = self._split.stage(stage, call)
        with (
            buffers_kept_if_empty(self._task.model, part, self._batch_norms),
            self._present(stage),
            self._precision.autocast(),
        ):
            outputs = module(*inputs)
        if stage < self._last:
            self._passages[stage, action.microbatch] = _Passage(inputs=inputs, outputs=list(outputs))
            self._note("forward", action, start_s)
            state = rng.state(self._device)
            wanted = [tensor.requires_grad for tensor in outputs]
            self._send("forward", action, 1, (call.to_text(), wanted), list(outputs), state)
            return None
        self._passages[stage, action.microbatch] = _Passage(inputs=inputs, outputs=[])
        state = rng.state(self._device)
        calls = 0

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise TaskError("the step calls model(...) twice: a pipeline carries one call, so call it once.")
            rng.set_state(state, self._device)
            return outputs

        self._seed(part, path)
        with self._guarded(), self._precision.autocast(), forward_replaced(self._task.model, answer):
            result = function(batch, part)
        self._note("forward", action, start_s)
        return result

    def _close_loss(self, action: Action, loss: torch.Tensor, weight: Any) -> None:
        passage = self._passages[action.stage, action.microbatch]
        counts = isinstance(weight, torch.Tensor) or weight != 0
        passage.silent = not counts and self._batch_norms is None
        if self._batch_norms is not None and not counts:
            self._batch_norms.silence()
        passage.outputs = [self._scaled(loss, weight if counts else 1)]

    def _backward(self, action: Action) -> None:
        passage = self._passages[action.stage, action.microbatch]
        if action.stage == self._last:
            total = passage.outputs[0]
            start_s = time.time()
        else:
            passage.silent, (gradients, _) = self._receive("backward", action, action.stage + 1)
            start_s = time.time()
            total = scalar(passage.outputs, gradients)
        if self._shards is not None:  # all of its ranks compute, whether it counts or not
            self._shards.silent = passage.silent
            for block in self._blocks[action.stage]:
                self._shards.begin_backward(block)
            if total.requires_grad:
                total.backward()
            self._shards.finish_backward()
        elif total.requires_grad and not passage.silent:
            total.backward()
        passage.outputs = []
        self._note("backward", action, start_s)
        if action.stage > 0:
            self._send("backward", action, -1, passage.silent, [tensor.grad for tensor in passage.inputs], [])
        del self._passages[action.stage, action.microbatch]

    def _seed(self, part: Slice, path: tuple[Any, ...]) -> None:
        rng.seed_torch(rng.derive(self._plan.seed, *path, part.index), self._device)

    def _note(self, kind: str, action: Action, start_s: float) -> None:
        if torch.is_grad_enabled():  # an evaluation is no part of the step
            self.work.append(Work(kind, action.stage, action.microbatch, start_s, time.time()))

    @contextlib.contextmanager
    def _present(self, stage: int) -> Iterator[None]:
        """While a stage computes, its parameters are whole."""
        for block in self._blocks[stage]:
            block.gather()
        yield
        for block in self._blocks[stage]:
            block.free()

    def _send(
        self, kind: str, action: Action, step: int, note: Any, tensors: list[Any], state: list[torch.Tensor | None]
    ) -> None:
        """Send to the rank of the next stage (`step` 1) or of the one before (-1)."""
        head = (kind, action.stage + step, action.microbatch)
        self._mail[step].send(head, (note, len(tensors)), [*tensors, *state])

    def _receive(self, kind: str, action: Action, source: int) -> tuple[Any, tuple[list[Any], list[Any]]]:
        head = (kind, action.stage, action.microbatch)
        (note, count), tensors = self._mail[source - action.stage].receive(head)
        return note, (tensors[:count], tensors[count:])


class _Mailbox:
    """A link whose messages are asked for by name: two ends may work through a schedule in a different order."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: dict[Any, Any] = {}

    def send(self, head: Any, note: Any, tensors: list[torch.Tensor | None]) -> None:
        self._link.send((head, note), tensors)

    def receive(self, head: Any) -> tuple[Any, list[Any]]:
        while head not in self._waiting:
            (other, note), tensors = self._link.receive()
            self._waiting[other] = note, tensors
        found: tuple[Any, list[Any]] = self._waiting.pop(head)
        return found
