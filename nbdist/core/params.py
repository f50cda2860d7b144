"""The table of a model's parameters and buffers: what is synchronised, optimized and brought home."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nbdist.core.channels import Channel

__all__ = ["ParamTable", "laid_out_like"]


@dataclass(frozen=True, kw_only=True)
class ParamTable:
    """Parameters and buffers by name; a tied one stands once, under its first name.

    Args:
        parameters: Every parameter, frozen ones included.
        buffers: Every buffer, those left out of ``state_dict`` included.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> ParamTable:
        """Read the table off a module."""
        return cls(parameters=dict(model.named_parameters()), buffers=dict(model.named_buffers()))

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that take a gradient."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers together, detached but not copied."""
        return {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items()}

    def broadcast_(self, channel: Channel) -> None:
        """Give every rank the weights and buffers of rank 0. **Collective** over `channel`."""
        for tensor in self.tensors.values():
            channel.broadcast_any_(tensor)

    def average_buffers_(self, channel: Channel) -> None:
        """Give every rank the mean of the floating-point buffers, and rank 0's other ones. **Collective**.

        Running statistics (BatchNorm) see only the local part of the data; their mean over the replicas is what the
        trained model holds. It is rank 0's value and the mean of the differences from it, so that constants, masks
        of infinities among them, stay what they are to the bit.
        """
        for buffer in self.buffers.values():
            shared = buffer.clone(memory_format=torch.contiguous_format)
            channel.broadcast_(shared)
            if buffer.is_floating_point():
                differences = torch.where(buffer == shared, 0.0, buffer - shared).contiguous()
                channel.all_reduce_(differences)
                shared += differences / channel.size
            buffer.copy_(shared)

    @torch.no_grad()
    def load_(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy `tensors` (those of another table of the same model) into this one's, in place. Local."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def laid_out_like(parameter: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
    """The part of `flat` from `start` on, laid out as `parameter` is (channels last, say).

    In another layout autograd and optimizers go slower ways.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat[start : start + parameter.numel()].as_strided(parameter.shape, strides)
