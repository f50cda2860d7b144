"""A block of sharded parameters (an FSDP unit): gathered, freed, its gradients reduced."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.params.param_data_watch import get_data, set_data
from nbdist.core.params.placeholder import Placeholders, dummy, is_placeholder, reveal
from nbdist.core.strategies.shard.whole_blocks import WholeBlocks, written_error
from nbdist.errors import PlanError

__all__ = ["Block"]


class Block:
    """Parameters that are all-gathered together.

    Args:
        number: Its index among the blocks, the same on all ranks.
        parameters: The parameters, still whole.
        rank: This rank on the ``shard`` axis.
        whole: Makes it whole.
        names: The names of the parameters, for errors.
        placeholders: Turns parameters into placeholders while they are not gathered.
        registry: Registry of gathered parameters, by the address of their memory; shared by all blocks.

    Attributes:
        places: The index of each parameter in the block.
        in_backward: Whether its backward has begun and not ended.
        late_gradients: Whether it may get gradients outside its module's backward: other code has read it, or no input
            or output of the module requires grad.
        gathered: Whether its parameters are whole now.
        taken: The indices of those whose ``data`` was taken since the gather: writes there do not change `_version`.
    """

    def __init__(
        self, number: int, parameters: list[nn.Parameter], rank: int, whole: WholeBlocks,
        names: dict[nn.Parameter, str], placeholders: Placeholders, registry: dict[int, tuple[Block, int]],
    ) -> None:  # fmt: skip
        self._number = number
        self.parameters = parameters
        self.places = {parameter: i for i, parameter in enumerate(parameters)}
        self._rank = rank
        self._whole = whole
        self.in_backward = self.late_gradients = self.gathered = False
        self.taken: set[int] = set()
        self._names = [names[parameter] for parameter in parameters]
        self._placeholders = placeholders
        self._registry = registry
        self._dummies = [dummy(p, p.device) for p in parameters]
        self._gathered_data: list[torch.Tensor] = []
        self._versions: list[tuple[int, int]] = []  # address and version of each while gathered
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)
        self._shards = whole.shard(number, parameters)
        for parameter, shard in zip(parameters, self._shards, strict=True):
            set_data(parameter, shard)

    def hide_shards(self) -> None:
        """Turn all parameters into placeholders, at the start of a step. Local."""
        for i, parameter in enumerate(self.parameters):
            self._gradients[i], parameter.grad = parameter.grad, None
            set_data(parameter, self._dummies[i])
            self._placeholders.hide(parameter)

    def expose_shards(self, summed: bool) -> None:
        """Point each parameter at this rank's shard; see `FullySharded.expose_shards`. Local."""
        self._forget()
        self.in_backward = self.late_gradients = False
        for i, parameter in enumerate(self.parameters):
            reveal(parameter)
            if summed and parameter.grad is not None:
                raise PlanError(
                    f"the gradient of parameter {self._names[i]} came after those of its layer had been summed over "
                    "the ranks, as a mesh with shard does: use the strategy data."
                )
            parameter.grad = None
            set_data(parameter, self._shards[i])
            parameter.grad = self._gradients[i]

    @torch.no_grad()
    def take_values(self) -> None:
        """Copy values that an optimizer has assigned as ``data`` into this rank's shards. Local, after an update."""
        for parameter, shard in zip(self.parameters, self._shards, strict=True):
            if (data := get_data(parameter)).data_ptr() != shard.data_ptr():
                shard.copy_(data)
                set_data(parameter, shard)

    @torch.no_grad()
    def gather(self) -> None:
        """Make the parameters whole. **Collective**."""
        if self.gathered:
            return
        self._gathered_data = self._whole.gather(self._number)
        self.gathered = True
        for i, (parameter, whole, layout) in enumerate(
            zip(self.parameters, self._gathered_data, self._dummies, strict=True)
        ):
            reveal(parameter)
            flat = whole if whole.numel() == layout.numel() else whole[: layout.numel()]
            set_data(parameter, flat.view(layout.shape))
            address = whole.data_ptr()
            self._versions.append((address, parameter._version))
            if address:
                self._registry[address] = self, i
        self.taken.clear()

    def name(self, parameter: nn.Parameter) -> str:
        """The name of a parameter."""
        return self._names[self.places[parameter]]

    def storage(self, place: int) -> torch.UntypedStorage:
        """The storage of a gathered parameter."""
        return self._gathered_data[place].untyped_storage()

    def free(self) -> None:
        """Free the gathered parameters. Local.

        Raises:
            PlanError: One of them was written.
        """
        if not self.gathered:
            return
        for i, parameter in enumerate(self.parameters):
            if (parameter.data_ptr(), parameter._version) != self._versions[i] or (
                i in self.taken and self._differs(i)
            ):
                raise written_error(self._names[i])
            set_data(parameter, self._dummies[i])
            self._placeholders.hide(parameter)
        self._forget()

    def _differs(self, i: int) -> bool:
        """Whether this rank's slice of a gathered parameter differs from its shard. Waits for the device."""
        length = len(self._shards[i])
        here = self._gathered_data[i][self._rank * length : (self._rank + 1) * length]
        return not torch.equal(here.view(torch.uint8), self._shards[i][: len(here)].view(torch.uint8))

    def _forget(self) -> None:
        self.gathered = False
        for address, _ in self._versions:
            self._registry.pop(address, None)
        self._versions = []
        self._gathered_data = []

    def sums(self) -> dict[int, torch.Tensor]:
        """See `SumsOf`. Local."""
        for i, parameter in enumerate(self.parameters):
            if parameter.requires_grad and self._gradients[i] is None:
                self._gradients[i] = torch.zeros_like(self._shards[i])
        return {
            i: own
            for i, (parameter, own) in enumerate(zip(self.parameters, self._gradients, strict=True))
            if parameter.requires_grad and own is not None
        }

    def own_gradient(self) -> str:
        """The name of a parameter that has a gradient which is not reduced yet; empty if there is none. Local."""
        found = (name for name, p in zip(self._names, self.parameters, strict=True) if p.grad is not None)
        return next(found, "")

    @torch.no_grad()
    def reduce(self, zero_gradients: bool) -> list[int]:
        """Add the ranks' gradients to the shards'; return the ids of used parameters. **Collective**."""
        gradients: dict[int, torch.Tensor | None] = {}
        for i, parameter in enumerate(self.parameters):
            if parameter.requires_grad:
                gradient, parameter.grad = parameter.grad, None
                gradients[i] = None if zero_gradients or gradient is None else gradient.to_dense()
        if gradients:
            self._whole.reduce(self._number, gradients)
        return [id(self.parameters[i]) for i, gradient in gradients.items() if gradient is not None]

    def close(self) -> None:
        """Leave this rank's shards in memory of its own, without gradients. Local."""
        for parameter, shard in zip(self.parameters, self._shards, strict=True):
            if not is_placeholder(parameter) and get_data(parameter).data_ptr() == shard.data_ptr():
                set_data(parameter, shard.clone())
