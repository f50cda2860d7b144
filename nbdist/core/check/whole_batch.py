"""Whether the slices of a batch are the whole batch: the mean of their losses, and of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from nbdist.core.check.findings import Findings, Refused
from nbdist.core.check.per_sample import PerSample
from nbdist.core.check.plain_step import PlainStep, StepResult
from nbdist.core.check.rounding import Rounding
from nbdist.core.check.samples import Samples
from nbdist.core.check.sentences import log_no_mean, no_mean, other_buffers, wrong_gradient
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["WholeBatch", "norms_of"]

_NORMS = nn.modules.batchnorm._BatchNorm


class WholeBatch:
    """Compares the slices of a few samples with the batch of all of them.

    Args:
        task: What is trained, its model whole.
        plan: How.
        samples: As slices, and as one batch.
        findings: Get a note where the whole batch gives other numbers, as documented.
    """

    def __init__(self, task: Task, plan: Plan, samples: Samples, findings: Findings) -> None:
        self._task, self._plan, self._samples, self._findings = task, plan, samples, findings

    def compare(self, step: PlainStep, expected: StepResult, rounding: Rounding) -> None:
        """Run the whole batch as one slice, and compare; documented differences become notes. Local.

        Args:
            step: Has run the slices.
            expected: Their result.
            rounding: What gradients may be off by.

        Raises:
            Refused: The loss is not the mean of the slices' losses, or a gradient not that of theirs.
        """
        whole, slices, drew = self._samples.whole, self._samples.slices, step.draws
        norms = norms_of(self._task.model)
        per_sample, sliced = PerSample(), expected
        with per_sample:
            step.draws = False
            single = step.run([[whole]])
            if norms or per_sample.normalizes or per_sample.replaces or drew or step.kept:
                sliced = step.run([[part] for part in slices], again=False)
                nudged = step.run([[whole]], nudge=True)
                rounding = Rounding(single, nudged, coarsest_eps=step.coarsest_eps).reordered()
        if not (single.finite and sliced.finite):
            self._findings.notes.append("slices were not compared with the whole batch: its loss is not finite")
            return
        if step.draws:
            self._findings.notes.append("slices were not compared with the whole batch: the step draws random numbers")
            return
        other = _differing(rounding, single, sliced)
        if other is None:
            self._note_norms(norms, per_sample)
            self._note_log(rounding, single, sliced)
            self._note_buffers(rounding, single, expected, norms, drew=drew)
            return
        # A forward that a checkpoint computes again in backward draws unseen: another seed shows it.
        with per_sample:
            reseeded = step.run([[replace(whole, index=self._plan.slices)]], again=False)
        if _differing(rounding, single, reseeded) is not None:
            self._findings.notes.append("slices were not compared with the whole batch: the step draws random numbers")
            return
        if not other:
            raise Refused(no_mean(single.loss, sliced, whole.samples))
        raise Refused(wrong_gradient(other, whole.samples, len(slices)))

    def _note_norms(self, norms: Sequence[str], per_sample: PerSample) -> None:
        if (norms or per_sample.normalizes) and not self._plan.sync_batchnorm:
            more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            self._findings.notes.append(
                f"{norms[0] if norms else 'the step'}{more} (BatchNorm) uses the statistics of each slice, not of the "
                "whole batch" + (": sync_batchnorm for those of all ranks" if self._can_synchronize else "")
            )

    def _note_log(self, rounding: Rounding, single: StepResult, sliced: StepResult) -> None:
        """A note on numbers that the step logs, and that are no means over slices."""
        for name, whole in single.logged.items():
            if name in sliced.logged and rounding.differs_log(name, whole, sliced.logged[name]):
                self._findings.notes.append(log_no_mean(name, whole, sliced.logged[name], self._samples.whole.samples))

    def _note_buffers(
        self, rounding: Rounding, single: StepResult, expected: StepResult, norms: Sequence[str], *, drew: bool
    ) -> None:
        """A note on those that the whole batch changes otherwise; of random ones only whole numbers are compared."""
        own = {n: b for n, b in expected.buffers.items() if n in single.buffers and n.rpartition(".")[0] not in norms}
        kept = {n: b for n, b in own.items() if not (drew and b.is_floating_point())}
        other = [n for n, buffer in kept.items() if rounding.differs("buffer", n, single.buffers[n], buffer)]
        if other:
            self._findings.notes.append(other_buffers(other))

    @property
    def _can_synchronize(self) -> bool:
        return self._plan.mesh.data > 1 and not self._plan.reproducible


def norms_of(model: nn.Module) -> list[str]:
    """The layers that normalize by the statistics of what they get, by name. Local."""
    return [name for name, module in model.named_modules() if isinstance(module, _NORMS) and module.training]


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
