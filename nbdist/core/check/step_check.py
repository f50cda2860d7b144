"""The check of a run before its first update: its mesh against one process, and its slices against the whole batch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbdist.core.check.findings import CannotBeChecked, Findings, NotFinite, Refused
from nbdist.core.check.mesh_difference import MeshDifference
from nbdist.core.check.muted import muted
from nbdist.core.check.plain_step import PlainStep, StepResult
from nbdist.core.check.rounding import Rounding
from nbdist.core.check.samples import Samples, read_samples, read_slice, synchronizes
from nbdist.core.check.sentences import OTHER_DATA
from nbdist.core.check.whole_batch import WholeBatch, norms_of
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice, copy_batch
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.program_state import ProgramState
from nbdist.core.params.structure_watch import StructureWatch
from nbdist.core.process import rng
from nbdist.core.process.memory import bytes_within_limits, is_out_of_memory
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import NO_FLAGS, first_of_all
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.loss_forms import check_one_form
from nbdist.core.sync.step_log import LogReducer
from nbdist.core.task.steps import SupervisedStep
from nbdist.core.task.task import Task
from nbdist.errors import NbdistError, PlanError, TaskError
from nbdist.plan import Plan, available_bytes

__all__ = ["StepCheck"]

_COPIES, _COPIES_OF_MESH, _COPIES_OF_LOSS = 8, 6, 4
"""How much memory the check needs at its peak, in sizes of the model: whole, with check="mesh", and for losses only."""
_FREE_SHARE = 0.8
_NO_SAME_DATA = "the data draws random numbers that differ from process to process"
_FEW_SLICES = 4
"""Up to so many, a rank runs the whole first batch where a step fails on few samples."""


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
        self._gathers = False
        self._left_out = ""
        self.findings = Findings()

    @property
    def runs_alone(self) -> bool:
        """Whether the step has run in this process alone."""
        return self._expected is not None

    def run_plain(self, loads: Sequence[Callable[[], None]] = (), *, same_weights: bool) -> None:
        """Run the step in this process alone, and compare slices with the whole batch. **Collective** over the world.

        Args:
            loads: Load what the run resumes from, whose weights are about to be used, into the whole model. Local.
            same_weights: Whether all ranks have the same weights already; else rank 0's are broadcast.

        Raises:
            TaskError: The loss of a batch is not the mean of its slices' losses, or ranks read other data.
        """
        message: dict[str, str] = {}
        digest, before = b"", None
        if loads or not same_weights:
            before = ProgramState(self._roots())
        with rng.fork_rng(self._device), muted():
            try:
                for load in loads:
                    load()
                if not same_weights:
                    ParamTable.of(self._task.model).broadcast_(self._world.channel())
                digest = self._run_attempts()
            except Refused as error:
                message = {"error": str(error)}
            except NbdistError as error:
                always = self._error_of_full_slice()
                message = {"skip" if always else "error": str(error)}  # the first step raises it, or never
            except Exception as error:
                if not is_out_of_memory(error) and (always := self._error_of_full_slice()) is not None:
                    raise always from None  # at once: a rank in an endless loop would never agree on it
                what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
                message = {"skip": f"the step cannot be run on a few samples alone ({what})"}
            except CannotBeChecked as why:
                message = {"skip": str(why)} if why.noted else {"skip": str(why), "quiet": "yes"}
            finally:
                if before is not None:  # until the run is known to start
                    before.restore()
        read = self._world.channel().broadcast_bytes(digest)
        if not message and read != digest:
            # Where each sample is read by one rank, such as one that is augmented at random, it may differ.
            one_reader = self._task.data.dataset is not None and self._plan.mesh.size == self._plan.mesh.data
            message = {"skip": _NO_SAME_DATA} if one_reader else {"error": OTHER_DATA.format(rank=self._world.rank)}
        agreed = first_of_all(json.dumps(message).encode() if message else b"", self._world.channel())
        if not agreed:
            if first_of_all(b"twice" if self._passes > 1 else b"", self._world.channel()):
                self._passes = 2
            return
        self._expected = None
        message = json.loads(agreed)
        if "skip" in message:
            self.findings.result = f"not checked: {message['skip']}"
            self.findings.notes = [] if "quiet" in message else [self.findings.result]
            return
        raise TaskError(message["error"])

    def _plain_step(self, *, forward_only: bool) -> PlainStep:
        return PlainStep(
            self._task, self._plan, self._hooks, lambda: ProgramState(self._roots()), self._device,
            forward_only=forward_only,
        )  # fmt: skip

    def _error_of_full_slice(self) -> Exception | None:
        """The error that the step raises on this rank's first slice in full, so that the run could not begin. Local."""
        if not self._slices or self._task.data.loading.get("num_workers") or self._task.data.head is not None:
            return None  # loading processes may read other data than this one, and rank 0 other data than others
        step = self._plain_step(forward_only=False)
        try:
            step.run([[read_slice(self._task, self._plan, self._world.rank)]], again=False)
        except CannotBeChecked:
            return None
        except Exception as error:
            return None if is_out_of_memory(error) else error  # a mesh need not meet it
        finally:
            step.state.restore()
        return None

    def _run_attempts(self) -> bytes:
        """Run all steps on the first samples that allow it; returns a digest of them."""
        try:
            return self._run_plain(even=False)
        except NbdistError:  # a loss may be a mean in slices of equal size only, or be known by the whole batch
            return self._run_plain(even=True)
        except NotFinite:
            if self._plan.slices > _FEW_SLICES:
                raise
            return self._run_plain(even=True, all_known=True)
        except Exception as error:
            # A step may need more samples, such as one of the ten largest losses; the ranks of a host then hold a whole
            # batch each, which is no more than twice what they hold in a run, if there are few of them.
            if is_out_of_memory(error) or self._plan.slices > _FEW_SLICES or self._error_of_full_slice() is not None:
                raise
            try:
                return self._run_plain(even=True, all_known=True)
            except Exception:  # the first error says more
                raise error from None

    def _run_plain(self, *, even: bool, all_known: bool = False) -> bytes:
        """Run all steps, with slices of equal or of other size; returns a digest of the samples."""
        samples = read_samples(self._task, self._plan, even=even, all_known=all_known)
        self._slices = samples.slices
        step = self._plain_step(forward_only=self._limit_memory())
        try:
            if even and len(self._slices) > 1:  # no form of it, seen in the whole batch, is a count of slices
                step.run([[replace(samples.whole, of=len(self._slices))]], again=False)
            self._run_steps(step, samples)
        finally:
            step.state.restore()
        return samples.digest

    def _limit_memory(self) -> bool:
        """Whether gradients must be left out, which one process has no memory for. Local.

        Raises:
            CannotBeChecked: There is not even memory for a copy of the model.
        """
        copies = _COPIES if self._plan.check == "yes" else _COPIES_OF_MESH
        model = self._task.model
        nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free = _free_bytes(self._world)
        if free is None or copies * nbytes <= free:
            return False
        need, has = copies * nbytes / 2**20, free / 2**20
        if _COPIES_OF_LOSS * nbytes > free:
            # What is that large is trained by those who know: no note.
            raise CannotBeChecked(f"it needs {need:,.0f} MiB on each rank, of which {has:,.0f} are free", noted=False)
        self._left_out = f"gradients were not compared: one process needs {need:,.0f} MiB for it, {has:,.0f} are free"
        return True

    def _run_steps(self, step: PlainStep, samples: Samples) -> None:
        plan, replicas = self._plan, samples.replicas
        if step.state.iterators:
            raise CannotBeChecked(
                f"the step can reach {next(iter(step.state.iterators))}, an iterator, which cannot be put back"
            )
        if step.state.excess:
            raise CannotBeChecked(f"the step can reach too many objects to put back, such as {step.state.excess}")
        try:
            expected = step.run(replicas, update=True)
        except Exception:
            if not step.gather.called:
                raise
        self._gathers = step.gather.called and plan.slices > 1
        if self._gathers:
            replicas = [[samples.whole]]
            expected = step.run(replicas, update=True)
        while not expected.finite and step.lower_scale():
            expected = step.run(replicas, update=True)
        if step.lower_scale():  # once more: parts of a sum on the mesh may be larger than the sum
            expected = step.run(replicas, update=True)
        self._scale = step.scale
        if not expected.finite:
            raise NotFinite("the loss, or a gradient, is not finite")
        if step.draws and synchronizes(self._task, plan):
            raise CannotBeChecked("the step draws random numbers, and layers synchronize their statistics")
        if self._gathers and (step.draws or (norms_of(self._task.model) and not synchronizes(self._task, plan))):
            raise CannotBeChecked("the step gathers the whole batch, but draws random numbers, or normalizes, by slice")
        if step.draws_elsewhere and not plan.reproducible:
            raise CannotBeChecked("the step draws random numbers with Python or NumPy")
        self._passes = 2 if step.kept else 1
        self.findings.notes += self._kept(step.kept_again)
        nudged = step.run(replicas, nudge=True)
        rounding = Rounding(expected, nudged, coarsest_eps=step.coarsest_eps)
        if self._gathers:  # then one process has the whole batch in one slice; buffers follow the slices
            self._expected, self._rounding = replace(expected, buffers={}), rounding.reordered()
            return
        self._expected, self._rounding = expected, rounding
        if plan.slices > 1 and plan.check == "yes":
            try:
                WholeBatch(self._task, plan, samples, self.findings).compare(step, expected, rounding.reordered())
            except Exception as error:  # as of a checkpointed forward, which had dropout only when it ran again
                what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
                self.findings.notes.append(f"slices were not compared with the whole batch: {what}")

    def compare(self, strategy: Strategy, loads: Sequence[Callable[[], None]] = ()) -> None:
        """Run the same step on the mesh, and compare; nothing of it is left. **Collective** over the world.

        Args:
            strategy: Of the mesh.
            loads: As for `run_plain`, but onto the mesh.

        Raises:
            PlanError: The mesh gives another result than one process.
            TaskError: The step changes what is trained, see `StructureWatch`.
        """
        if (expected := self._expected) is None:
            return
        axes = strategy.axes
        mine = [self._slices[i] for i in ReductionTree.share(len(self._slices), axes.data.rank, axes.data.size)]
        off = ""
        assert self._rounding is not None
        rounding = self._rounding.reordered() if axes.mesh.tp > 1 else self._rounding
        samples = sum(part.samples for part in self._slices)
        difference = MeshDifference(strategy, expected, rounding, samples, gathers=self._gathers)
        log_reducer = LogReducer.of(self._task.log, axes, self._plan)
        with rng.fork_rng(self._device), muted(), self._loaded(loads), strategy.trial(self._scale):
            state = ProgramState(self._roots(), keep_storage=True)
            structure = StructureWatch(self._task.model, self._task.optimizers.values())
            try:
                for number in range(self._passes):
                    strategy.begin_step()
                    self._task.begin()
                    strategy.forward_backward(0, [replace(part, batch=copy_batch(part.batch)) for part in mine])
                    structure.check(number)
                    totals = strategy.sync(log_reducer.flags(self._task.forms.flags(NO_FLAGS, 0)))
                    check_one_form(totals.flags)
                    log = log_reducer.reduce(totals.flags)
                    if number == 0 and log is not None:
                        self.findings.notes += difference.of_log(log.means)
                    if number == 0:
                        strategy.finish_gradients()
                        off = difference.of_loss(totals.loss) or difference.of_gradients()
                strategy.average_buffers()
                off = off or difference.of_state() or difference.of_update()
            finally:
                state.restore()
        found = first_of_all(off.encode(), axes.world).decode()
        if found:
            strategy.gather()  # the model is to be as before
            raise PlanError(found)
        counts = {
            "gradients": sum(gradient is not None for gradient in expected.gradients.values()),
            "updates": len(expected.updated),
            "buffers": len(expected.buffers),
        }
        equal = ", ".join(["loss", *(f"{count} {what}" for what, count in counts.items() if count)])
        self.findings.result = f"{equal} as in one process" + (f"; {self._left_out}" if self._left_out else "")
        if self._left_out:
            self.findings.notes.append(self._left_out)

    @contextlib.contextmanager
    def _loaded(self, loads: Sequence[Callable[[], None]]) -> Iterator[None]:
        """Context in which the mesh has what the run resumes from. **Collective** where there is any."""
        if not loads:
            yield
            return
        before = ProgramState(self._roots(), keep_storage=True)
        for load in loads:
            load()
        # A barrier: where ranks share the memory of weights, each has now loaded its own.
        first_of_all(b"", self._world.channel())
        try:
            yield
        finally:
            before.restore()

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
            "come back to the notebook; keep it in a buffer of the model, or in get_extra_state (a step's number is "
            "nbdist.current_step())"
        ]

    @property
    def _models(self) -> dict[str, nn.Module]:
        return {name or "model": part for name, part in self._task.modules.items()}

    def _roots(self) -> dict[str, Any]:
        task = self._task
        step = task.step.loss if isinstance(task.step, SupervisedStep) else task.own_step
        optimizers = {f"optimizer {name}".strip(): optimizer for name, optimizer in task.optimizers.items()}
        return {**self._models, "step": step, "root": task.model, **optimizers}


def _free_bytes(world: World) -> float | None:
    """The memory that a rank may use, of its device; None if unknown."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0] * _FREE_SHARE
    free, within_limits = available_bytes(), bytes_within_limits()
    known = [nbytes for nbytes in (free and free / world.local_size, within_limits) if nbytes is not None]
    return min(known) * _FREE_SHARE if known else None
