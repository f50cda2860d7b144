"""The table of a model's parameters and buffers by name: broadcast, gathered, averaged, loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.placeholder import detached, reveal
from nbdist.core.params.placement import Placement
from nbdist.errors import TaskError

__all__ = ["ParamTable", "assign_", "copy_or_zero_", "replace_data", "restore_buffers", "view_like"]


@dataclass(frozen=True, kw_only=True)
class ParamTable:
    """Parameters and buffers by name; a tied one is listed once, under its first name.

    Args:
        parameters: Every parameter, frozen ones included. They are always the model's own objects; only their data
            changes: this rank's part, or a dummy if it holds none.
        buffers: Every buffer, non-persistent ones included; read anew at each access, as a forward may assign others.
        placements: Where the parts of each tensor are; tensors that are not listed are whole on every rank.
        owners: The only rank on ``dp`` that updates a parameter, if ranks share weights.
    """

    parameters: dict[str, nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    placements: dict[str, Placement] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ParamTable:
        """The table of a module."""
        return cls(parameters=dict(model.named_parameters()), buffers=_Buffers(model))

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
        """Where the parts of a tensor are."""
        if name in self.placements:
            return self.placements[name]
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name]
        return Placement(layout=torch.empty_like(tensor, device="meta"))

    def is_updated(self, name: str, axes: MeshChannels) -> bool:
        """Whether this rank's optimizer updates its part of a parameter."""
        return self.owners.get(name, axes.dp.rank) == axes.dp.rank

    def held(self, axes: MeshChannels) -> dict[str, nn.Parameter]:
        """The trainable parameters of which this rank holds a part."""
        return {name: p for name, p in self.trainable.items() if self.placement(name).held(axes)}

    @torch.no_grad()
    def broadcast_(self, channel: Channel) -> None:
        """Broadcast the weights and buffers of rank 0. **Collective** over `channel`.

        A tensor that is equal already is not written: pages that processes share stay shared.
        """
        for tensor in self.tensors.values():
            received = tensor.clone(memory_format=torch.contiguous_format)
            channel.broadcast_(received)
            if not torch.equal(received, tensor):
                tensor.copy_(received)

    @torch.no_grad()
    def gather_(
        self, axes: MeshChannels, *, keep: bool = True,
        empty_like: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Gather every tensor, one by one, into the model on ranks with `keep`. **Collective** over the replica.

        Args:
            axes: The mesh.
            keep: Whether this rank keeps it.
            empty_like: Makes the memory of whole parameters; by default it is torch's.
        """
        for name, placement in self.placements.items():
            held = placement.held(axes)
            if name in self.buffers:
                whole = placement.gather(self.buffers[name] if held else None, axes)
                self.buffers[name].copy_(whole)
                continue
            parameter = self.parameters[name]
            whole = placement.gather(parameter.data if held else None, axes)
            if keep:
                replace_data(parameter, placement.with_layout(whole, empty_like))
        if keep:
            self.placements.clear()

    @torch.no_grad()
    def whole(self, axes: MeshChannels, *, keep: bool) -> dict[str, torch.Tensor]:
        """Every tensor, whole, on ranks with `keep`; the model stays as it is. **Collective** over the replica.

        What is whole on this rank is not copied.
        """
        whole: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            placement = self.placements.get(name)
            if placement is not None:
                tensor = placement.gather(tensor if placement.held(axes) else None, axes)
                tensor = placement.with_layout(tensor) if keep else tensor
            if keep:
                whole[name] = tensor
        return whole

    @torch.no_grad()
    def average_buffers_(self, channel: Channel, axes: MeshChannels | None = None) -> None:
        """Average the floating-point buffers over ranks, and broadcast rank 0's other buffers. **Collective**.

        Running statistics (BatchNorm) depend on a rank's own data; the trained model gets their mean over the replicas.
        It is computed as rank 0's value plus the mean difference from it, so that constants, masks of infinities among
        them, keep their bits.
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
            if not torch.equal(shared, buffer):  # a write would raise the version counter
                buffer.copy_(shared)

    @torch.no_grad()
    def load_(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy `tensors`, of another table of the same model, into this one's, in place; others stay. Local."""
        for name, tensor in self.objects.items():
            if name in tensors:
                assign_(tensor, tensors[name])


@torch.no_grad()
def assign_(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a parameter or buffer. An expanded one gets memory of its own, unless nothing changes. Local."""
    data = detached(tensor)
    if data.layout is torch.strided and any(
        size > 1 and not stride for size, stride in zip(data.shape, data.stride(), strict=True)
    ):
        if not torch.equal(data, values := values.to(data.device)):
            tensor.data = values.clone(memory_format=torch.contiguous_format)
    else:
        data.copy_(values)


class _Buffers(Mapping[str, torch.Tensor]):
    """The present buffers of a model by the names that it has now; a tied one is listed once."""

    def __init__(self, model: nn.Module) -> None:
        owners = {f"{path}.{key}" if path else key: (m, key) for path, m in model.named_modules() for key in m._buffers}
        self._places = {name: owners[name] for name, _ in model.named_buffers()}

    def __getitem__(self, name: str) -> torch.Tensor:
        module, key = self._places[name]
        buffer: torch.Tensor | None = module._buffers[key]
        if buffer is None:
            raise TaskError(f"the training has set buffer {name} to None: keep a tensor in it.")
        return buffer

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextlib.contextmanager
def restore_buffers(model: nn.Module, but: Collection[int] = ()) -> Iterator[None]:
    """Restore every buffer's values at the end of the context, except for those whose ids are in `but`. Local.

    Through ``data``, unnoticed by autograd: graphs of other slices may hold the buffers, and would see a new version,
    though no gradient depends on their values.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in but]
    yield
    for buffer, values in before:
        buffer.data.copy_(values)


@torch.no_grad()
def copy_or_zero_(targets: list[torch.Tensor], values: list[torch.Tensor | None]) -> None:
    """Copy each value to its target, or zeros if there is none. Local."""
    given = [(target, value) for target, value in zip(targets, values, strict=True) if value is not None]
    if given:
        torch._foreach_copy_([target for target, _ in given], [value for _, value in given])
    for target, value in zip(targets, values, strict=True):
        if value is None:
            target.zero_()


def view_like(parameter: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
    """A view of `flat` from `start` on, with the shape and strides of `parameter` (channels last, say).

    With other strides autograd and optimizers are slower.
    """
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat[start : start + parameter.numel()].as_strided(parameter.shape, strides)


def replace_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter data of another shape, and no gradient. Local.

    A graph that is still alive holds the parameter's AccumulateGrad node, and that node the old shape. torch drops the
    node when the dtype changes, so the data is first set to another dtype.
    """
    reveal(parameter)
    parameter.grad = None
    other = torch.float32 if data.dtype != torch.float32 else torch.float64
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
