"""The device mesh as one rank sees it: a channel along each axis."""

from __future__ import annotations

from nbdist.core.comm import Channel
from nbdist.core.comm.world import World
from nbdist.plan import Mesh

__all__ = ["MeshChannels"]


class MeshChannels:
    """The channels of one rank. **Collective** over the world: all ranks construct it, with the same mesh.

    Args:
        world: The world whose ranks the mesh covers.
        mesh: How its ranks are laid out.

    Attributes:
        pp, dp, shard, tp: The channel along each axis.
        data: Over the ranks that a global batch is distributed over, ``dp`` and ``shard`` together.
        replica: Over the ranks that make one replica of the model: all axes but ``dp``.
        world: Over all ranks.
    """

    def __init__(self, world: World, mesh: Mesh) -> None:
        def along(*axes: str) -> Channel:
            return world.channel_within(mesh.groups(*axes))

        self.mesh = mesh
        self.world = world.channel()
        self.pp, self.dp, self.shard, self.tp = along("pp"), along("dp"), along("shard"), along("tp")
        self.data = self.dp if mesh.shard == 1 else self.shard if mesh.dp == 1 else along("dp", "shard")
        self.replica = self.world if mesh.dp == 1 else along("pp", "shard", "tp")

    @property
    def reports_loss(self) -> bool:
        """Whether this is the reporting rank of its share of the data: the last stage's first ``tp`` rank."""
        return self.pp.rank == self.pp.size - 1 and self.tp.rank == 0

    def close(self) -> None:
        """Close all channels but the one over all ranks, which the world owns. Local."""
        for channel in (self.pp, self.dp, self.shard, self.tp, self.data, self.replica):
            if channel is not self.world:
                channel.close()
