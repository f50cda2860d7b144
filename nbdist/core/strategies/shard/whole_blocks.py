"""The blocks of a model while they are whole: how ranks get their values, and add up their gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from nbdist.errors import PlanError

__all__ = ["EVALUATION", "TRAINING", "SumsOf", "WholeBlocks", "written_error"]

EVALUATION = "evaluation"
"""What blocks are gathered for: forwards without gradients."""
TRAINING = "training"
"""What blocks are gathered for: a step."""
SumsOf = Callable[[int], dict[int, torch.Tensor]]
"""This rank's shard of the sum of each gradient of a block, by the index of the parameter in the block."""


class WholeBlocks(ABC):
    """How blocks become whole on every rank of an axis. A block is named by its number.

    Ranks may need different blocks, in any order and number: what is collective serves those of other ranks too.

    A shard is flat, and of equal length on all ranks; the last ones are padded with zeros.
    """

    @abstractmethod
    def shard(self, number: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Copy this rank's shard of each parameter, still whole. Local, once for each block."""

    @abstractmethod
    def begin(self, phase: str) -> None:
        """Call before blocks are gathered, after shards may have been written. **Collective**.

        Args:
            phase: `TRAINING` or `EVALUATION`.
        """

    @abstractmethod
    def gather(self, number: int) -> list[torch.Tensor]:
        """The parameters of a block, flat, maybe padded; each in a storage of its own. **Collective**."""

    @abstractmethod
    def reduce(self, number: int, gradients: dict[int, torch.Tensor | None]) -> None:
        """Add this rank's shard of the gradients' sum over the ranks, taken in rank order, to its sums. **Collective**.

        Args:
            number: The block.
            gradients: Whole, of the parameters that take one, by their index in the block; None counts as zero.
        """

    def settle(self) -> None:  # noqa: B027 - nothing to do where a gather waits for nobody
        """Call after a forward, before other collectives: ranks may have gathered different blocks. **Collective**."""

    @abstractmethod
    def end(self, phase: str) -> None:
        """Call after the last gather and reduce of a phase. **Collective**.

        Raises:
            PlanError: This rank has written to a block.
        """

    def close(self) -> None:  # noqa: B027
        """Release memory of a channel. Local."""


def written_error(name: str, how: str = "") -> PlanError:
    """The error for a write to a gathered parameter, which would be lost."""
    return PlanError(
        f"the model's forward, or the step, writes to parameter {name}{how}, of which each rank holds a shard on a "
        "mesh with shard: let the optimizer change it, or use the strategy data."
    )
