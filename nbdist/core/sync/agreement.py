"""What ranks agree on after a step: stop, snapshot, checkpoint, pending commands, the loss's form.

Each rank sets **control flags**; their sums over all ranks are the same everywhere, so all ranks act alike after the
same step. The flags ride in the tail of the gradient sync (`core/sync/step_tail.py`), where they cost no collective of
their own. Where no gradients are summed, `agree` sums flags alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nbdist.core.comm import Channel
from nbdist.errors import TaskError

__all__ = ["NO_FLAGS", "ControlFlags", "agree", "first_of_all", "raise_on_all"]


class ControlFlags(NamedTuple):
    """One rank's flags at the end of a step, zeros and ones; after the sum, the number of ranks that set each.

    Args:
        commands: The rank has commands for all ranks, see `StepControl`.
        snapshot: It asks all ranks to take a snapshot after this step.
        checkpoint: It asks all ranks to write a checkpoint of this step to disk.
        written: Its part of the checkpoint under way is on disk.
        unwritten: It failed to write that part.
        losses: It has a loss whose form must be the same on all ranks.
        form: That form as a number, see `LossForms`.
        form_squared: The square of that number.
        names: Its step logs a number under a new name, see `LogReducer`.
    """

    commands: float = 0
    snapshot: float = 0
    checkpoint: float = 0
    written: float = 0
    unwritten: float = 0
    losses: float = 0
    form: float = 0
    form_squared: float = 0
    names: float = 0


NO_FLAGS = ControlFlags()


def agree(flags: ControlFlags, channel: Channel) -> ControlFlags:
    """Sum flags in an all-reduce of their own. **Collective** over the channel; waits for the device."""
    sums = torch.tensor(flags, dtype=torch.float32, device=channel.device)
    channel.all_reduce_(sums)
    return ControlFlags(*sums.tolist())


def first_of_all(message: bytes, channel: Channel) -> bytes:
    """The message of the first rank whose own is not empty; empty if all are. **Collective** over the channel."""
    given = torch.zeros(channel.size, dtype=torch.float32, device=channel.device)
    given[channel.rank] = bool(message)
    channel.all_reduce_(given)
    ranks = given.nonzero().flatten().tolist()
    return channel.broadcast_bytes(message, ranks[0]) if ranks else b""


def raise_on_all(sentence: str, channel: Channel) -> None:
    """Raise on every rank what the first rank found that found anything. **Collective** over the channel.

    Args:
        sentence: What this rank found wrong with the task; empty if nothing.
        channel: Of the ranks.

    Raises:
        TaskError: A rank found something.
    """
    if found := first_of_all(sentence.encode(), channel).decode():
        raise TaskError(found)
