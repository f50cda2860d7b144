"""The check of a run before its first update: its mesh against one process, and its slices against the whole batch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nbdist.core.check.per_sample import PerSample
from nbdist.core.check.plain_step import PlainStep, StepResult
from nbdist.core.check.program_state import ProgramState
from nbdist.core.check.rounding import Rounding
from nbdist.core.check.sentences import OTHER_DATA, apart, no_mean, off_on_mesh, wrong_gradient
from nbdist.core.check.value_records import same_state
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import tensors_in
from nbdist.core.params.extra_state import extra_states
from nbdist.core.params.param_table import ParamTable
from nbdist.core.process import rng
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import NO_FLAGS, first_of_all
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.loss_forms import check_one_form
from nbdist.core.sync.sync_batchnorm import BatchNorms
from nbdist.core.task.modules import Modules
from nbdist.core.task.task import SupervisedStep, Task
from nbdist.errors import NbdistError, PlanError, TaskError
from nbdist.plan import Plan, slice_bounds

__all__ = ["Findings", "StepCheck"]

_DATA_BYTES = 2**20
_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(kw_only=True)
class Findings:
    """What the check of a run has found.

    Args:
        result: One clause: what is equal, or why nothing was checked.
        notes: Sentences for the user.
    """

    result: str = ""
    notes: list[str] = field(default_factory=list)


class StepCheck:
    """Checks a run before its first update: `run_plain` before its strategy is made, then `compare`.

    Args:
        task: What is trained, its model whole.
        plan: How.
        world: All ranks.
        hooks: The user's gradient hooks.
    """

    def __init__(self, task: Task, plan: Plan, world: World, hooks: GradientHooks) -> None:
        self._task, self._plan, self._world, self._hooks = task, plan, world, hooks
        self._device = world.device
        self._expected: StepResult | None = None
        self._rounding: Rounding | None = None
        self._slices: list[Slice] = []
        self._scale = 1.0
        self._passes = 1
        self.findings = Findings()

    @property
    def runs_alone(self) -> bool:
        """Whether the step has run in this process alone."""
        return self._expected is not None

    def run_plain(self, *, same_weights: bool) -> None:
        """Run the step in this process alone, and compare slices with the whole batch. **Collective** over the world.

        Args:
            same_weights: Whether all ranks have the same weights already; else rank 0's are broadcast.

        Raises:
            TaskError: The loss of a batch is not the mean of its slices' losses, or ranks read other data.
        """
        message: dict[str, str] = {}
        digest, table = b"", ParamTable.of(self._task.model)
        own = {} if same_weights else {name: tensor.clone() for name, tensor in table.tensors.items()}
        if own:
            table.broadcast_(self._world.channel())
        with rng.fork_rng(self._device), _muted():
            try:
                whole, replicas = self._read()
                digest = _digest(whole.batch)
                self._run_plain(whole, replicas)
            except _Refused as error:
                message = {"error": str(error)}
            except NbdistError as error:  # of the step, which the first step of the run will raise too, if it is so
                message = {"skip": str(error)}
            except Exception as error:
                what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
                message = {"skip": f"the step cannot be run on a few samples alone ({what})"}
            except _CannotBeChecked as why:
                message = {"skip": str(why)}
        if own:  # until the run is known to start
            table.load_(own)
        read = self._world.channel().broadcast_bytes(digest)
        if not message and read != digest:
            message = {"error": OTHER_DATA.format(rank=self._world.rank)}
        agreed = first_of_all(json.dumps(message).encode() if message else b"", self._world.channel())
        if not agreed:
            return
        self._expected = None
        message = json.loads(agreed)
        if "skip" in message:
            self.findings.result = f"not checked: {message['skip']}"
            self.findings.notes = [self.findings.result]
            return
        raise TaskError(message["error"])

    def _read(self) -> tuple[Slice, list[list[Slice]]]:
        """The samples of the check as one batch, and as the slices of each replica."""
        task, plan = self._task, self._plan
        samples = min(plan.batch_size, 2 * plan.slices + 1, task.data.samples or plan.batch_size)
        bounds = slice_bounds(samples, plan.slices)
        if bounds[-1][0] == bounds[-1][1]:
            raise _CannotBeChecked("there are fewer samples than slices")
        rng.seed_all(rng.derive(plan.seed, "check"))
        cuts = [range(*pair) for pair in bounds]
        together = self._synchronized(cuts)
        reads = ProgramState({"data": task.data.dataset or task.data.stream}, large_bytes=_DATA_BYTES)
        try:
            batches = task.data.batches([*cuts, range(samples), *together])
        finally:
            reads.restore()
        if reads.excess:
            raise _CannotBeChecked(f"the data holds too many objects to put back, such as {reads.excess}")
        if batches is None:
            raise _CannotBeChecked("the data can be read only once")
        made = [
            Slice(index=i, samples=len(cut), batch=batch, of=plan.slices)
            for i, (cut, batch) in enumerate(zip(cuts, batches, strict=False))
        ]
        self._slices = made
        whole = Slice(index=0, samples=samples, batch=batches[len(cuts)])
        joined = [
            Slice(index=i, samples=len(rows), batch=batch, of=plan.slices)
            for i, (rows, batch) in enumerate(zip(together, batches[len(cuts) + 1 :], strict=True))
        ]
        return whole, [joined] if joined else self._replicas()

    def _run_plain(self, whole: Slice, replicas: list[list[Slice]]) -> None:
        step = PlainStep(self._task, self._plan, self._hooks, lambda: ProgramState(self._roots()), self._device)
        try:
            self._run_steps(step, whole, replicas)
        finally:
            step.state.restore()

    def _run_steps(self, step: PlainStep, whole: Slice, replicas: list[list[Slice]]) -> None:
        plan = self._plan
        if step.state.iterators:
            raise _CannotBeChecked(
                f"the step can reach {step.state.iterators[0]}, an iterator, which cannot be put back"
            )
        if step.state.excess:
            raise _CannotBeChecked(f"the step can reach too many objects to put back, such as {step.state.excess}")
        expected = step.run(replicas)
        while not _finite(expected) and step.lower_scale():
            expected = step.run(replicas)
        self._scale = step.scale
        if not _finite(expected):
            raise _CannotBeChecked("the loss, or a gradient, is not finite")
        if step.draws and self._synchronizes:
            raise _CannotBeChecked("the step draws random numbers, and layers synchronize their statistics")
        if step.draws_elsewhere and not plan.reproducible:
            raise _CannotBeChecked("the step draws random numbers with Python or NumPy")
        self._passes = 2 if step.kept else 1
        self.findings.notes += self._kept(step.kept_again)
        nudged = step.run(replicas, nudge=True)
        self._expected, self._rounding = expected, Rounding(expected, nudged)
        if plan.slices > 1 and plan.check == "yes":
            try:
                self._compare_whole(step, whole, expected)
            except Exception as error:  # as of a checkpointed forward, which had dropout only when it ran again
                what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
                self.findings.notes.append(f"slices were not compared with the whole batch: {what}")

    @property
    def _synchronizes(self) -> bool:
        plan = self._plan
        return plan.sync_batchnorm and plan.mesh.data > 1 and bool(BatchNorms.layers_of(self._task.model))

    def _synchronized(self, cuts: list[range]) -> list[list[int]]:
        """The samples whose statistics BatchNorm takes together: those of a microbatch on all ranks. Else none."""
        if not self._synchronizes:
            return []
        each = len(cuts) // self._plan.mesh.data
        return [[i for cut in cuts[k::each] for i in cut] for k in range(each)]

    def _replicas(self) -> list[list[Slice]]:
        """The slices of each replica."""
        plan, slices = self._plan, self._slices
        if plan.reproducible:
            return [[part] for part in slices]
        return [
            [slices[i] for i in ReductionTree.share(len(slices), rank, plan.mesh.data)]
            for rank in range(plan.mesh.data)
        ]

    def _compare_whole(self, step: PlainStep, whole: Slice, expected: StepResult) -> None:
        """Whether the loss of the whole batch is the mean of its slices' losses, and its gradients theirs."""
        drew = step.draws
        norms = [name for name, m in self._task.model.named_modules() if isinstance(m, _NORMS) and m.training]
        per_sample, sliced = PerSample(), expected
        with per_sample:
            step.draws = False
            single = step.run([[whole]], again=False)
            rounding = self._rounding
            if norms or per_sample.normalizes or drew or step.kept:
                sliced = step.run([[part] for part in self._slices], again=False)
                rounding = Rounding(single, step.run([[whole]], again=False, nudge=True))
        if not (_finite(single) and _finite(sliced)):
            self.findings.notes.append("slices were not compared with the whole batch: its loss is not finite")
            return
        if step.draws:
            self.findings.notes.append("slices were not compared with the whole batch: the step draws random numbers")
            return
        assert rounding is not None
        other = _differing(rounding, single, sliced)
        if other is None:
            self._note_norms(norms, per_sample)
            return
        # A forward that a checkpoint computes again in backward draws unseen: another seed shows it.
        with per_sample:
            reseeded = step.run([[replace(whole, index=self._plan.slices)]], again=False)
        if _differing(rounding, single, reseeded) is not None:
            self.findings.notes.append("slices were not compared with the whole batch: the step draws random numbers")
            return
        if not other:
            raise _Refused(no_mean(single.loss, sliced, whole.samples))
        raise _Refused(wrong_gradient(other, whole.samples, len(self._slices)))

    def _note_norms(self, norms: Sequence[str], per_sample: PerSample) -> None:
        if (norms or per_sample.normalizes) and not self._plan.sync_batchnorm:
            more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            self.findings.notes.append(
                f"{norms[0] if norms else 'the step'}{more} (BatchNorm) uses the statistics of each slice, not of the "
                "whole batch" + ("" if self._plan.reproducible else ": sync_batchnorm for those of all ranks")
            )

    def compare(self, strategy: Strategy) -> None:
        """Run the same step on the mesh, and compare; nothing of it is left. **Collective** over the world.

        Raises:
            PlanError: The mesh gives another result than one process.
        """
        if (expected := self._expected) is None:
            return
        axes = strategy.axes
        mine = [self._slices[i] for i in ReductionTree.share(len(self._slices), axes.data.rank, axes.data.size)]
        off = ""
        with rng.fork_rng(self._device), _muted(), strategy.trial(self._scale):
            state = ProgramState(self._roots(), keep_storage=True)
            try:
                for number in range(self._passes):
                    strategy.begin_step()
                    self._task.forms.begin()
                    strategy.forward_backward(0, mine)
                    totals = strategy.sync(self._task.forms.flags(NO_FLAGS, 0))
                    check_one_form(totals.flags)
                    if number == 0:
                        strategy.finish_gradients(self._hooks)
                        off = self._wrong_step(strategy, expected, totals.loss)
                strategy.average_buffers()
                off = off or self._wrong_state(strategy, expected)
            finally:
                state.restore()
        found = first_of_all(off.encode(), axes.world).decode()
        if found:
            raise PlanError(found)
        count = sum(gradient is not None for gradient in expected.gradients.values())
        kept = f", {len(expected.buffers)} buffers" if expected.buffers else ""
        self.findings.result = f"loss, {count} gradients{kept} equal those of one process"

    def _wrong_step(self, strategy: Strategy, expected: StepResult, loss: float | None) -> str:
        assert self._rounding is not None
        if loss is None or self._rounding.differs_loss(expected.loss, loss):
            return self._words("the loss", f"is {loss}, not {expected.loss:.6g}")
        for name, parameter in strategy.table.trainable.items():
            placement = strategy.table.placement(name)
            if not placement.held(strategy.axes) or not strategy.table.is_updated(name, strategy.axes):
                continue
            whole, got = expected.gradients[name], parameter.grad
            if whole is None or got is None:
                if (whole is None) != (got is None) and bool((got if whole is None else whole).any()):  # type: ignore[union-attr]
                    return self._words(
                        f"the gradient of {name}", "is missing" if got is None else "should not be there"
                    )
                continue
            part = whole if placement.whole else placement.part(whole, strategy.axes)
            if self._rounding.differs("gradient", name, part, got.reshape(part.shape)):
                return self._words(f"the gradient of {name}", apart(part, got))
        return ""

    def _wrong_state(self, strategy: Strategy, expected: StepResult) -> str:
        assert self._rounding is not None
        for name, buffer in strategy.table.buffers.items():
            placement = strategy.table.placement(name)
            if name not in expected.buffers or not placement.held(strategy.axes):
                continue
            whole = expected.buffers[name]
            part = whole if placement.whole else placement.part(whole, strategy.axes)
            if self._rounding.differs("buffer", name, part, buffer.reshape(part.shape)):
                return self._words(f"buffer {name}", apart(part, buffer))
        if strategy.axes.data.rank == 0 and self._plan.mesh.pp == 1:
            for name, extra in extra_states(self._task.model).items():
                if not same_state(extra, expected.extra.get(name)):
                    return self._words(f"the extra state of {name or 'the model'}", "differs")
        return ""

    def _words(self, what: str, how: str) -> str:
        return off_on_mesh(self._plan.mesh, what, how, sum(part.samples for part in self._slices))

    def _kept(self, paths: Sequence[str]) -> list[str]:
        """A note on what the step changes each time beside the model's tensors, which stays on the engines."""
        tensors = {f"{name}.{tensor}" for name, model in self._models.items() for tensor, _ in model.named_buffers()}
        tensors |= {
            f"{name}.{tensor}" for name, model in self._models.items() for tensor, _ in model.named_parameters()
        }
        found = [path for path in paths if path not in tensors and not path.startswith("optimizer")]
        if not found:
            return []
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return [
            f"the step changes {found[0]}{more} beside weights and buffers: each rank has its own, and it does not "
            "come back to the notebook; keep it in a buffer of the model, or in get_extra_state"
        ]

    @property
    def _models(self) -> dict[str, nn.Module]:
        model = self._task.model
        return dict(model.named_children()) if isinstance(model, Modules) else {"model": model}

    def _roots(self) -> dict[str, Any]:
        task = self._task
        step = task.step.loss if isinstance(task.step, SupervisedStep) else task.step
        optimizers = {f"optimizer {name}".strip(): optimizer for name, optimizer in task.optimizers.items()}
        return {**self._models, "step": step, "root": task.model, **optimizers}


class _CannotBeChecked(BaseException):
    """Why nothing can be checked."""


class _Refused(BaseException):
    """Why the run is refused."""


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Context in which what a step prints is dropped: the user has called it for none of these steps."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _differing(rounding: Rounding, first: StepResult, second: StepResult) -> str | None:
    """The first parameter whose gradients differ by more than rounding; empty for the loss, None for none."""
    if rounding.differs_loss(first.loss, second.loss):
        return ""
    for name, one in first.gradients.items():
        two = second.gradients[name]
        if (one is None) != (two is None):
            return name
        if one is not None and two is not None and rounding.differs("gradient", name, one, two):
            return name
    return None


def _finite(result: StepResult) -> bool:
    gradients = [g for g in result.gradients.values() if g is not None]
    return math.isfinite(result.loss) and all(bool(g.isfinite().all()) for g in gradients)


def _digest(batch: Any) -> bytes:
    """A digest of the tensors in a batch."""
    made = hashlib.blake2b(digest_size=16)
    for tensor in tensors_in(batch):
        made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.digest()
