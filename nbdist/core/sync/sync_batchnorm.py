"""BatchNorm over the samples of all data-parallel ranks, on any device.

torch's own SyncBatchNorm is for GPUs, and is another class than the user's. Here the user's modules stay: while a model
is trained, they compute with the mean and variance over the k-th slices of all ranks. One collective forward, of each
rank's mean, squared deviations and count, and one backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nbdist.core.comm import Channel
from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import tensors_in
from nbdist.core.params.table import buffers_kept

__all__ = ["BatchNorms", "buffers_kept_if_empty"]

_OURS = {cls.forward for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)}


class BatchNorms:
    """The BatchNorm layers of a model, and the channel over which they measure.

    Once installed, all ranks must run the same layers in the same order, forward and backward: a rank without samples
    too, with samples that do not count. Layers in evaluation mode are as always.

    Args:
        model: Its layers that are torch's BatchNorm, and have no forward of the user's.
        channel: Over the ranks that share a batch.
    """

    def __init__(self, model: nn.Module, channel: Channel) -> None:
        self.channel = channel
        self.counts = True
        self.layers = [m for m in model.modules() if type(m).forward in _OURS and "forward" not in vars(m)]
        self._model = model
        self._outputs: list[Any] = []
        self._hook: Any = None
        self._alone = False

    def install(self) -> None:
        """Let the layers measure together. Local."""
        for layer in self.layers:
            vars(layer)["forward"] = functools.partial(self._forward, layer)
        self._hook = self._model.register_forward_hook(self._keep)

    def close(self) -> None:
        """Let every layer be as it was. Local, twice is fine."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            for layer in self.layers:
                vars(layer).pop("forward", None)
        self._outputs.clear()

    @property
    def buffers(self) -> set[int]:
        """The ids of the running statistics, which are the same on all ranks."""
        return {id(buffer) for layer in self.layers for buffer in layer.buffers()}

    def begin(self, counts: bool) -> None:
        """The samples that come now count, or stand in for none. Local."""
        self.counts = counts
        self._outputs.clear()

    def silence(self) -> None:
        """Let the loss of the latest output have no gradient; that of the other ranks still passes. Local.

        The mean over nothing is not a number, nor is zero times its gradient.
        """
        for tensor in tensors_in(self._outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(torch.zeros_like)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let this rank's layers measure by themselves: others take no part. Local."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    def keep(self, output: Any) -> None:
        """Remember what the model returned, for `silence`. Local."""
        if torch.is_grad_enabled():
            self._outputs.append(output)

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.keep(output)

    def _forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        if self._alone or not layer.training:
            own: torch.Tensor = type(layer).forward(layer, x)
            return own
        layer._check_input_dim(x)
        result: tuple[torch.Tensor, ...] = _Normalized.apply(  # type: ignore[no-untyped-call]
            x, layer.weight, layer.bias, layer.eps, self.counts, self.channel
        )
        y, mean, variance, count = result
        if layer.track_running_stats:
            _track(layer, mean, variance * (count / (count - 1).clamp(min=1)).to(variance.dtype))
        return y


@contextlib.contextmanager
def buffers_kept_if_empty(model: nn.Module, part: Slice, batch_norms: BatchNorms | None) -> Iterator[None]:
    """While a model computes a slice: one without samples leaves no trace in the buffers. Local."""
    synced: set[int] = set()
    if batch_norms is not None:
        batch_norms.begin(part.samples > 0)
        synced = batch_norms.buffers
    with contextlib.nullcontext() if part.samples else buffers_kept(model, but=synced):
        yield


@torch.no_grad()
def _track(layer: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Update running statistics as torch does after a batch with this mean and unbiased variance."""
    momentum = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    for running, now in ((layer.running_mean, mean), (layer.running_var, variance)):
        if running is not None:
            running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)


class _Normalized(torch.autograd.Function):
    """``y``, and the mean, variance and number of samples (times places) over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, counts: bool,
        channel: Channel,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        mean, variance, count = _measured(x, counts, channel)
        if channel.device.type == "cpu" and count < 2:  # a GPU would have to be waited for
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        ctx.counts, ctx.channel = counts, channel
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        scale, shift = (None if tensor is None else tensor.to(mean.dtype) for tensor in (weight, bias))
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, eps), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape, others = _shape(x), _others(x)
        deviation = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        gradient = gradient.to(mean.dtype)
        sums = torch.stack([gradient.sum(others), (gradient * deviation).sum(others)])
        of_bias, of_weight = sums
        of_x = None
        if ctx.needs_input_grad[0]:
            totals = torch.zeros_like(sums, dtype=torch.float64)
            if ctx.counts:
                totals.copy_(sums)
            ctx.channel.all_reduce_(totals)
            of_x = gradient
            if ctx.counts:  # what does not count has not moved the statistics
                first, second = (totals / count).to(mean.dtype)
                of_x = gradient - first.view(shape) - deviation * second.view(shape)
            of_x = (of_x * (scale if weight is None else scale * weight.to(scale.dtype)).view(shape)).to(x.dtype)
        return (
            of_x,
            of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            of_bias.to(mean.dtype if weight is None else weight.dtype) if ctx.needs_input_grad[2] else None,
            None, None, None,
        )  # fmt: skip


def _measured(x: torch.Tensor, counts: bool, channel: Channel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and count by channel of `x` over all ranks. **Collective**.

    Every rank's mean and squares about it, not sums of squares, from which a large mean would take all digits.
    """
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    own_variance, own_mean = torch.var_mean(x.to(dtype), _others(x), correction=0)
    number = x.numel() // x.shape[1] if counts else 0
    told = torch.cat([own_mean.double(), own_variance.double(), own_mean.new_tensor([number], dtype=torch.float64)])
    if not counts:
        told.zero_()  # what it holds may be no number
    gathered = torch.stack(channel.all_gather(told))
    features = x.shape[1]
    means, variances, numbers = gathered.split([features, features, 1], 1)
    count = numbers.sum()
    shares = numbers / count
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return mean.to(dtype), variance.to(dtype), count


def _others(x: torch.Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _shape(x: torch.Tensor) -> list[int]:
    return [-1 if dim == 1 else 1 for dim in range(x.ndim)]
