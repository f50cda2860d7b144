"""The blocks of a model while they are whole: how ranks get their values, and add up their gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from nbdist.errors import PlanError

__all__ = ["WholeBlocks", "order_error", "written_error"]


class WholeBlocks(ABC):
    """How blocks become whole on every rank of an axis. A block is named by its number.

    A shard is flat, and of equal length on all ranks; the last ones are padded with zeros.
    """

    @abstractmethod
    def shard(self, number: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Copy this rank's shard of each parameter, still whole. Local, once for each block."""

    def begin(self) -> None:  # noqa: B027 - nothing to wait for where a gather waits
        """Call before blocks are gathered, after shards may have been written. **Collective**."""

    @abstractmethod
    def gather(self, number: int) -> list[torch.Tensor]:
        """The parameters of a block, flat, maybe padded; each in a storage of its own. **Collective**."""

    @abstractmethod
    def reduce(self, number: int, gradients: dict[int, torch.Tensor | None], sums: dict[int, torch.Tensor]) -> None:
        """Add this rank's shard of the gradients' sum over the ranks, taken in rank order, to `sums`. **Collective**.

        Args:
            number: The block.
            gradients: Whole, of the parameters that take one, by their index in the block; None counts as zero.
            sums: This rank's shard of each, for the same parameters.

        Raises:
            PlanError: Another rank reduces another block.
        """

    @abstractmethod
    def end(self) -> None:
        """Call after the last reduce of a step, when nobody computes with blocks any more. **Collective**.

        Raises:
            PlanError: Another rank has computed other blocks, or this one has written to one.
        """

    def close(self) -> None:  # noqa: B027
        """Release memory of a channel. Local."""


def order_error(name: str | None) -> PlanError:
    """The error for ranks that compute different blocks: this one the block of the named parameter, or none."""
    here = "has computed all it needs" if name is None else f"needs {name}"
    return PlanError(
        f"the ranks compute different layers: where this one {here}, another one needs another. On a mesh with shard "
        "the data may not decide which layers are computed, or in which order: compute all of them, without samples "
        "where there are none, or use the strategy data."
    )


def written_error(name: str, how: str = "") -> PlanError:
    """The error for a write to a gathered parameter, which would be lost."""
    return PlanError(
        f"the model's forward, or the step, writes to parameter {name}{how}, of which each rank holds a shard on a "
        "mesh with shard: let the optimizer change it, or use the strategy data."
    )
