"""Synchronized BatchNorm: statistics over the samples of all data-parallel ranks, on any device.

torch's SyncBatchNorm is for GPUs and replaces the user's modules. Here the modules stay: in training they normalize
with the mean and variance over the k-th slices of all ranks. Forward takes one collective, of each rank's mean,
variance and count, and backward takes one.
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
from nbdist.core.params.param_table import restore_buffers
from nbdist.upstream.torch_private import check_input_dim

__all__ = ["BatchNorms", "buffers_kept_if_empty"]

_SUPPORTED = {cls.forward for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)}


class BatchNorms:
    """The BatchNorm layers of a model, and the channel over which their statistics are computed.

    Once installed, all ranks must run the same layers in the same order, forward and backward. A rank without data
    runs them with samples that do not count. Layers in evaluation mode are unchanged.

    Args:
        model: Its layers with the forward of torch's BatchNorm classes are synchronized.
        channel: The data-parallel axis.
    """

    def __init__(self, model: nn.Module, channel: Channel) -> None:
        self.channel = channel
        self.counts = True
        self.layers = self.layers_of(model)
        self._model = model
        names = {module: name for name, module in model.named_modules()}
        self._purposes = {layer: f"the statistics of {names[layer]}" for layer in self.layers}
        self._outputs: list[Any] = []
        self._hook: Any = None
        self._local_only = False

    @staticmethod
    def layers_of(model: nn.Module) -> list[Any]:
        """The layers of a model that can be synchronized. Local."""
        return [m for m in model.modules() if type(m).forward in _SUPPORTED and "forward" not in vars(m)]

    def install(self) -> None:
        """Replace the layers' forward by the synchronized one. Local."""
        for layer in self.layers:
            vars(layer)["forward"] = functools.partial(self._forward, layer)
        self._hook = self._model.register_forward_hook(self._on_output)

    def close(self) -> None:
        """Give every layer its own forward back. Local; may be called twice."""
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

    def begin_slice(self, counts: bool) -> None:
        """Call before a slice: whether its samples count, or only fill in for missing data. Local."""
        self.counts = counts
        self._outputs.clear()

    def zero_output_gradients(self) -> None:
        """Zero the gradient of the latest output, so that only other ranks' losses pass through this rank. Local.

        A weight of zero would not do: a mean over nothing is NaN, and so is zero times its gradient.
        """
        for tensor in tensors_in(self._outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(torch.zeros_like)

    @contextlib.contextmanager
    def local_only(self) -> Iterator[None]:
        """Context in which this rank computes its statistics alone, without collectives. Local."""
        before, self._local_only = self._local_only, True
        try:
            yield
        finally:
            self._local_only = before

    def record_output(self, output: Any) -> None:
        """Save what the model returned, for `zero_output_gradients`. Local."""
        if torch.is_grad_enabled():
            self._outputs.append(output)

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.record_output(output)

    def _forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        if self._local_only or not layer.training:
            own: torch.Tensor = type(layer).forward(layer, x)
            return own
        check_input_dim(layer, x)
        result: tuple[torch.Tensor, ...] = _Normalized.apply(  # type: ignore[no-untyped-call]
            x, layer.weight, layer.bias, layer.eps, self.counts, self.channel, self._purposes[layer]
        )
        y, mean, variance, count = result
        if layer.track_running_stats:
            _track(layer, mean, variance * (count / (count - 1).clamp(min=1)).to(variance.dtype))
        return y


@contextlib.contextmanager
def buffers_kept_if_empty(model: nn.Module, part: Slice, batch_norms: BatchNorms | None) -> Iterator[None]:
    """Context for computing a slice; one without samples does not change the model's buffers. Local."""
    synced: set[int] = set()
    if batch_norms is not None:
        batch_norms.begin_slice(part.samples > 0)
        synced = batch_norms.buffers
    with contextlib.nullcontext() if part.samples else restore_buffers(model, but=synced):
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
        channel: Channel, purpose: str,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        with channel.used_for(purpose):
            mean, variance, count = _global_statistics(x, counts, channel)
        if channel.device.type == "cpu" and count < 2:  # not on a GPU, which this would wait for
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        ctx.counts, ctx.channel, ctx.purpose = counts, channel, purpose
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        scale, shift = (None if tensor is None else tensor.to(mean.dtype) for tensor in (weight, bias))
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, eps), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape, dims = _broadcast_shape(x), _reduced_dims(x)
        deviation = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        gradient = gradient.to(mean.dtype)
        sums = torch.stack([gradient.sum(dims), (gradient * deviation).sum(dims)])
        grad_bias, grad_weight = sums
        grad_x = None
        if ctx.needs_input_grad[0]:
            totals = torch.zeros_like(sums, dtype=torch.float64)
            if ctx.counts:
                totals.copy_(sums)
            with ctx.channel.used_for(ctx.purpose):
                ctx.channel.all_reduce_(totals)
            grad_x = gradient
            if ctx.counts:  # samples that do not count have no share in the statistics
                first, second = (totals / count).to(mean.dtype)
                grad_x = gradient - first.view(shape) - deviation * second.view(shape)
            grad_x = (grad_x * (scale if weight is None else scale * weight.to(scale.dtype)).view(shape)).to(x.dtype)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias.to(mean.dtype if weight is None else weight.dtype) if ctx.needs_input_grad[2] else None,
            None, None, None, None,
        )  # fmt: skip


def _global_statistics(
    x: torch.Tensor, counts: bool, channel: Channel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and count by channel of `x` over all ranks. **Collective**.

    From every rank's mean and variance, not from sums of squares: those cancel if the mean is large.
    """
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    own_variance, own_mean = torch.var_mean(x.to(dtype), _reduced_dims(x), correction=0)
    number = x.numel() // x.shape[1] if counts else 0
    statistics = torch.cat(
        [own_mean.double(), own_variance.double(), own_mean.new_tensor([number], dtype=torch.float64)]
    )
    if not counts:
        statistics.zero_()  # NaN times a count of zero would be NaN
    gathered = torch.stack(channel.all_gather(statistics))
    features = x.shape[1]
    means, variances, numbers = gathered.split([features, features, 1], 1)
    count = numbers.sum()
    shares = numbers / count
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return mean.to(dtype), variance.to(dtype), count


def _reduced_dims(x: torch.Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _broadcast_shape(x: torch.Tensor) -> list[int]:
    return [-1 if dim == 1 else 1 for dim in range(x.ndim)]
