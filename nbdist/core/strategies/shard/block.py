"""Parameters that are gathered together: this rank's parts of them, the whole of them for a while, their gradients."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.data_watch import put_data
from nbdist.core.params.placeholder import Placeholders, dummy, reveal
from nbdist.core.params.placement import shard_of
from nbdist.errors import PlanError

__all__ = ["Block", "written"]

_HEADER = 16
"""Elements before the parts that ranks give each other, the first of which says of which block; a cache line."""


class Block:
    """The parameters that are gathered together.

    Args:
        number: Its place among the blocks, on all ranks the same.
        parameters: Which, whole as yet.
        channel: The ``shard`` axis.
        names: What the parameters are called in errors.
        placeholders: What hides them.
        homes: Where gathered ones are noted, by the address of their memory.

    Attributes:
        places: The place of each parameter.
        awaited: Whether backward has begun with it and not ended.
        read: Whether gradients may come that its module does not see: others have read it, or nothing that the module
            takes or gives has a gradient.
        gathered: Whether its parameters are whole now.
        taken: The places of those whose ``data`` somebody has taken since: what is written there torch does not count.
    """

    def __init__(
        self, number: int, parameters: list[nn.Parameter], channel: Channel, names: dict[nn.Parameter, str],
        placeholders: Placeholders, homes: dict[int, tuple[Block, int]],
    ) -> None:  # fmt: skip
        self._number = 1 + number % 127  # exact in every dtype
        self._odd: bool | torch.Tensor = False  # whether another rank gave another block
        self.parameters = parameters
        self.places = {parameter: i for i, parameter in enumerate(parameters)}
        self.channel = channel
        self.awaited = self.read = self.gathered = False
        self.taken: set[int] = set()
        self._names = [names[parameter] for parameter in parameters]
        self._placeholders = placeholders
        self._registered = homes
        self._stand_ins = [dummy(p, p.device) for p in parameters]
        self._lengths = [-(-p.numel() // channel.size) for p in parameters]
        self._homes: list[torch.Tensor] = []
        self._marks: list[tuple[int, int]] = []  # where each one lies and at which version, while they are gathered
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)
        self._parts: list[torch.Tensor] = [p.data for p in parameters]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, parameter in enumerate(parameters):
            by_dtype.setdefault(parameter.dtype, []).append(i)
        # For each dtype its members, and their parts one after the other, ready to be sent.
        self._runs = [(members, self._lay_out(members)) for members in by_dtype.values()]

    def _lay_out(self, members: list[int]) -> torch.Tensor:
        run = self.parameters[members[0]].new_zeros(_HEADER + sum(self._lengths[i] for i in members))
        run[0] = self._number
        for i, place in zip(members, run[_HEADER:].split([self._lengths[i] for i in members]), strict=True):
            place.copy_(shard_of(self._parts[i], self.channel.rank, self.channel.size))
            self._parts[i] = place
            put_data(self.parameters[i], place)
        return run

    def hide(self) -> None:
        """Begin to compute: nothing is there. Local."""
        for i, parameter in enumerate(self.parameters):
            self._gradients[i], parameter.grad = parameter.grad, None
            put_data(parameter, self._stand_ins[i])
            self._placeholders.hide(parameter)

    def show(self, summed: bool) -> None:
        """Let each parameter be this rank's part; see `FullySharded.show`. Local."""
        self._forget()
        self.awaited = self.read = False
        for i, parameter in enumerate(self.parameters):
            reveal(parameter)
            if summed and parameter.grad is not None:
                raise PlanError(
                    f"the gradient of parameter {self._names[i]} came when that of its layer was summed over the ranks "
                    "already, as a mesh with shard does: use the strategy data."
                )
            parameter.grad = None
            put_data(parameter, self._parts[i])
            parameter.grad = self._gradients[i]

    @torch.no_grad()
    def gather(self) -> None:
        """Make the parameters whole. **Collective**."""
        if self.gathered:
            return
        homes: dict[int, torch.Tensor] = {}
        for members, run in self._runs:
            lengths = [self._lengths[i] for i in members]
            gathered = self.channel.all_gather(run)
            self._compare(gathered, run)
            rows = [row[_HEADER:].split(lengths) for row in gathered]
            for i, *pieces in zip(members, *rows, strict=True):
                homes[i] = torch.cat(pieces)
        self._homes = [homes[i] for i in range(len(homes))]
        self.gathered = True
        for i, (parameter, home, layout) in enumerate(zip(self.parameters, self._homes, self._stand_ins, strict=True)):
            reveal(parameter)
            flat = home if home.numel() == layout.numel() else home[: layout.numel()]
            put_data(parameter, flat.view(layout.shape))
            address = home.data_ptr()
            self._marks.append((address, parameter._version))
            if address:
                self._registered[address] = self, i
        self.taken.clear()

    def _compare(self, gathered: list[torch.Tensor], run: torch.Tensor) -> None:
        """See that all ranks have given parts of this block."""
        if self.channel.device.type == "cpu":
            beside = gathered[(self.channel.rank + 1) % self.channel.size]  # if all are alike, so are neighbours
            self._odd = beside[0].item() != self._number
            self.check_order()
        else:  # which is not waited for
            self._odd = self._odd | (torch.stack([row[0] for row in gathered]) != run[0]).any()

    def check_order(self) -> None:
        """See that all ranks have gathered the same blocks in the same order. Local.

        Raises:
            PlanError: They have not.
        """
        odd, self._odd = self._odd, False
        if odd:
            raise PlanError(
                f"the ranks compute different layers: where this one needs {self._names[0]}, another one needs "
                "something else. On a mesh with shard the data may not decide which layers are computed, or in "
                "which order: compute all of them, without samples where there are none, or use the strategy data."
            )

    def name(self, parameter: nn.Parameter) -> str:
        """What a parameter is called."""
        return self._names[self.places[parameter]]

    def storage(self, place: int) -> torch.UntypedStorage:
        """Where the values of a parameter lie, while they are gathered."""
        return self._homes[place].untyped_storage()

    def free(self) -> None:
        """Let go of what was gathered. Local.

        Raises:
            PlanError: Somebody has written to it.
        """
        if not self.gathered:
            return
        for i, parameter in enumerate(self.parameters):
            if (parameter.data_ptr(), parameter._version) != self._marks[i] or (i in self.taken and self._differs(i)):
                raise written(self._names[i])
            put_data(parameter, self._stand_ins[i])
            self._placeholders.hide(parameter)
        self._forget()

    def _differs(self, i: int) -> bool:
        """Whether what was gathered is not this rank's part any more, where that lies in it; waits for the device."""
        length = self._lengths[i]
        here = self._homes[i].narrow(0, self.channel.rank * length, length)
        return not torch.equal(here.view(torch.uint8), self._parts[i].view(torch.uint8))

    def _forget(self) -> None:
        self.gathered = False
        for address, _ in self._marks:
            self._registered.pop(address, None)
        self._marks = []
        self._homes = []

    @torch.no_grad()
    def reduce(self, silent: bool) -> list[int]:
        """Add the sum over the ranks to the gradients of this rank's parts; returns whose parameters had one, by id."""
        used = []
        for members, run in self._runs:
            trained = [i for i in members if self.parameters[i].requires_grad]
            lengths = [self._lengths[i] for i in trained]
            rows = run.new_zeros((self.channel.size, sum(lengths)))
            for i, place in zip(trained, rows.split(lengths, 1), strict=True):
                parameter = self.parameters[i]
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None and not silent:
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


def written(name: str, how: str = "") -> PlanError:
    """The error for whoever writes to what was gathered."""
    return PlanError(
        f"the model's forward, or the step, writes to parameter {name}{how}, of which each rank keeps a part on a mesh "
        "with shard: let the optimizer change it, or use the strategy data."
    )
