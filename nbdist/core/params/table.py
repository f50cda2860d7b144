"""The table of a model's parameters and buffers: what is synchronised, optimized, gathered and brought home."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.placeholder import detached, reveal
from nbdist.core.params.placement import Placement

__all__ = ["ParamTable", "buffers_kept", "copy_or_zero_", "laid_out_like", "replace_data"]


@dataclass(frozen=True, kw_only=True)
class ParamTable:
    """Parameters and buffers by name; a tied one stands once, under its first name.

    Args:
        parameters: Every parameter, frozen ones included. They are the model's own objects all the time; what changes
            is their data: this rank's part, or a dummy where it holds none.
        buffers: Every buffer, those left out of ``state_dict`` included.
        placements: Which part of each tensor lies where; those that are not named lie whole on every rank.
        owners: The rank on ``dp`` that alone updates a parameter, where ranks share the weights.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]
    placements: dict[str, Placement] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ParamTable:
        """Read the table off a module."""
        return cls(parameters=dict(model.named_parameters()), buffers=dict(model.named_buffers()))

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that take a gradient, on any rank."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @property
    def objects(self) -> dict[str, torch.Tensor]:
        """The model's own parameters and buffers by name, each once."""
        return {**self.parameters, **self.buffers}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers together, detached but not copied."""
        return {name: detached(t) for name, t in self.objects.items()}

    def placement(self, name: str) -> Placement:
        """Where the parts of a tensor lie."""
        if name in self.placements:
            return self.placements[name]
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name]
        return Placement(layout=torch.empty_like(tensor, device="meta"))

    def is_updated(self, name: str, axes: MeshChannels) -> bool:
        """Whether this rank's optimizer updates a parameter, of which it holds a part."""
        return self.owners.get(name, axes.dp.rank) == axes.dp.rank

    def held(self, axes: MeshChannels) -> dict[str, nn.Parameter]:
        """The trainable parameters of which this rank holds a part."""
        return {name: p for name, p in self.trainable.items() if self.placement(name).held(axes)}

    @torch.no_grad()
    def broadcast_(self, channel: Channel) -> None:
        """Give every rank the weights and buffers of rank 0. **Collective** over `channel`.

        What is there already is left alone: pages that processes share stay shared.
        """
        for tensor in self.tensors.values():
            told = tensor.clone(memory_format=torch.contiguous_format)
            channel.broadcast_(told)
            if not torch.equal(told, tensor):
                tensor.copy_(told)

    @torch.no_grad()
    def gather_(self, axes: MeshChannels, *, keep: bool = True) -> None:
        """Make every tensor whole again, one by one, where `keep` says so. **Collective** over the replica."""
        for name, placement in self.placements.items():
            held = placement.held(axes)
            if name in self.buffers:
                whole = placement.gather(self.buffers[name] if held else None, axes)
                self.buffers[name].copy_(whole)
                continue
            parameter = self.parameters[name]
            whole = placement.gather(parameter.data if held else None, axes)
            if keep:
                replace_data(parameter, placement.laid_out(whole))
        if keep:
            self.placements.clear()

    @torch.no_grad()
    def average_buffers_(self, channel: Channel, axes: MeshChannels | None = None) -> None:
        """Give every rank the mean of the floating-point buffers, and rank 0's other ones. **Collective**.

        Running statistics (BatchNorm) see only the local part of the data; their mean over the replicas is what the
        trained model holds. It is rank 0's value and the mean of the differences from it, so that constants, masks
        of infinities among them, stay what they are to the bit.
        """
        for name, buffer in self.buffers.items():
            if axes is not None and not self.placement(name).held(axes):
                continue
            shared = buffer.clone(memory_format=torch.contiguous_format)
            channel.broadcast_(shared)
            if buffer.is_floating_point():
                differences = torch.where(buffer == shared, 0.0, buffer - shared).contiguous()
                channel.all_reduce_(differences)
                shared += differences / channel.size
            if not torch.equal(shared, buffer):  # a write would look like a change
                buffer.copy_(shared)

    @torch.no_grad()
    def load_(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy `tensors` (those of another table of the same model) into this one's, in place. Local."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@contextlib.contextmanager
def buffers_kept(model: nn.Module, but: Collection[int] = ()) -> Iterator[None]:
    """Give every buffer its values back at the end, except for those whose ids are in `but`. Local.

    Unseen by autograd, for graphs of other slices may hold the buffers, though no gradient depends on their values.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in but]
    yield
    for buffer, values in before:
        buffer.data.copy_(values)


@torch.no_grad()
def copy_or_zero_(places: list[torch.Tensor], values: list[torch.Tensor | None]) -> None:
    """Copy each value to its place, or zeros where there is none. Local."""
    given = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    if given:
        torch._foreach_copy_([place for place, _ in given], [value for _, value in given])
    for place, value in zip(places, values, strict=True):
        if value is None:
            place.zero_()


def laid_out_like(parameter: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
    """The part of `flat` from `start` on, laid out as `parameter` is (channels last, say).

    In another layout autograd and optimizers go slower ways.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat[start : start + parameter.numel()].as_strided(parameter.shape, strides)


def replace_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter data of another shape, and no gradient. Local.

    A graph that somebody keeps holds the node that accumulates the gradient, and that node the old shape. torch lets
    go of the node where the dtype changes, which is why the data pass through another one.
    """
    reveal(parameter)
    parameter.grad = None
    other = torch.float32 if data.dtype != torch.float32 else torch.float64
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
