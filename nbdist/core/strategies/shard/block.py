"""A block of sharded parameters (an FSDP unit): all-gather, free, reduce-scatter of gradients."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.param_data_watch import set_data
from nbdist.core.params.placeholder import Placeholders, dummy, reveal
from nbdist.core.params.placement import shard_of
from nbdist.errors import PlanError

__all__ = ["Block", "written_error"]

_HEADER = 16
"""Elements before each rank's shards in an all-gather, a cache line. The first one is the number of the block."""


class Block:
    """Parameters that are all-gathered together.

    Args:
        number: Its index among the blocks, the same on all ranks.
        parameters: The parameters, still whole.
        channel: The ``shard`` axis.
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
        self, number: int, parameters: list[nn.Parameter], channel: Channel, names: dict[nn.Parameter, str],
        placeholders: Placeholders, registry: dict[int, tuple[Block, int]],
    ) -> None:  # fmt: skip
        self._number = 1 + number % 127  # exact in every dtype
        self._mismatch: bool | torch.Tensor = False  # whether another rank gathered another block
        self.parameters = parameters
        self.places = {parameter: i for i, parameter in enumerate(parameters)}
        self.channel = channel
        self.in_backward = self.late_gradients = self.gathered = False
        self.taken: set[int] = set()
        self._names = [names[parameter] for parameter in parameters]
        self._placeholders = placeholders
        self._registry = registry
        self._dummies = [dummy(p, p.device) for p in parameters]
        self._lengths = [-(-p.numel() // channel.size) for p in parameters]
        self._gathered_data: list[torch.Tensor] = []
        self._versions: list[tuple[int, int]] = []  # address and version of each while gathered
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)
        self._shards: list[torch.Tensor] = [p.data for p in parameters]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, parameter in enumerate(parameters):
            by_dtype.setdefault(parameter.dtype, []).append(i)
        # For each dtype the indices of its parameters, and their shards in one flat tensor, the all-gather's input.
        self._runs = [(members, self._lay_out(members)) for members in by_dtype.values()]

    def _lay_out(self, members: list[int]) -> torch.Tensor:
        run = self.parameters[members[0]].new_zeros(_HEADER + sum(self._lengths[i] for i in members))
        run[0] = self._number
        for i, place in zip(members, run[_HEADER:].split([self._lengths[i] for i in members]), strict=True):
            place.copy_(shard_of(self._shards[i], self.channel.rank, self.channel.size))
            self._shards[i] = place
            set_data(self.parameters[i], place)
        return run

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
    def gather(self) -> None:
        """All-gather the parameters into new memory. **Collective**."""
        if self.gathered:
            return
        wholes: dict[int, torch.Tensor] = {}
        for members, run in self._runs:
            lengths = [self._lengths[i] for i in members]
            gathered = self.channel.all_gather(run)
            self._check_block_numbers(gathered, run)
            rows = [row[_HEADER:].split(lengths) for row in gathered]
            for i, *shards in zip(members, *rows, strict=True):
                wholes[i] = torch.cat(shards)
        self._gathered_data = [wholes[i] for i in range(len(wholes))]
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

    def _check_block_numbers(self, gathered: list[torch.Tensor], run: torch.Tensor) -> None:
        """Compare the block numbers of all ranks."""
        if self.channel.device.type == "cpu":
            # Each rank compares with its neighbour: together they compare all.
            neighbour = gathered[(self.channel.rank + 1) % self.channel.size]
            self._mismatch = neighbour[0].item() != self._number
            self.check_order()
        else:  # on the GPU without waiting for it; `check_order` reads it
            self._mismatch = self._mismatch | (torch.stack([row[0] for row in gathered]) != run[0]).any()

    def check_order(self) -> None:
        """Check that all ranks have gathered the same blocks in the same order. Local.

        Raises:
            PlanError: They have not.
        """
        mismatch, self._mismatch = self._mismatch, False
        if mismatch:
            raise PlanError(
                f"the ranks compute different layers: where this one needs {self._names[0]}, another one needs "
                "another. On a mesh with shard the data may not decide which layers are computed, or in "
                "which order: compute all of them, without samples where there are none, or use the strategy data."
            )

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
        length = self._lengths[i]
        here = self._gathered_data[i].narrow(0, self.channel.rank * length, length)
        return not torch.equal(here.view(torch.uint8), self._shards[i].view(torch.uint8))

    def _forget(self) -> None:
        self.gathered = False
        for address, _ in self._versions:
            self._registry.pop(address, None)
        self._versions = []
        self._gathered_data = []

    @torch.no_grad()
    def reduce(self, zero_gradients: bool) -> list[int]:
        """Reduce-scatter gradients and add them to the shards'; return the ids of used parameters. **Collective**."""
        used = []
        for members, run in self._runs:
            trained = [i for i in members if self.parameters[i].requires_grad]
            lengths = [self._lengths[i] for i in trained]
            rows = run.new_zeros((self.channel.size, sum(lengths)))
            for i, place in zip(trained, rows.split(lengths, 1), strict=True):
                parameter = self.parameters[i]
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None and not zero_gradients:
                    used.append(id(parameter))
                    padded = gradient.new_zeros(place.numel())
                    padded[: gradient.numel()] = gradient.reshape(-1)
                    place.copy_(padded.view_as(place))
            if not trained:
                continue
            for i, total in zip(trained, self.channel.reduce_scatter(rows.view(-1)).split(lengths), strict=True):
                own = self._gradients[i]
                self._gradients[i] = total.clone() if own is None else own.add_(total)
        return used


def written_error(name: str, how: str = "") -> PlanError:
    """The error for a write to a gathered parameter, which would be lost."""
    return PlanError(
        f"the model's forward, or the step, writes to parameter {name}{how}, of which each rank holds a shard on a "
        "mesh with shard: let the optimizer change it, or use the strategy data."
    )
