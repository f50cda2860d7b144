"""The ``tp`` axis: single layers are split over its ranks."""

from __future__ import annotations

import contextlib

from nbdist.core.strategies import tensor as tensor_parallel
from nbdist.core.strategies.mesh_axis import Example, MeshAxis

__all__ = ["TensorAxis"]


class TensorAxis(MeshAxis):
    """Tensor parallelism. See `MeshAxis`."""

    _parallelized: tensor_parallel.Parallelized | None = None

    def apply(self, example: Example) -> None:
        """See `MeshAxis`."""
        placements = self.placements
        model, channel, rules = placements.task.model, placements.channels.tp, placements.plan.tensor_plan
        if rules is None:
            proposed = tensor_parallel.derive_plan(model, channel.size, *example)
        else:
            proposed = tensor_parallel.plan_from_rules(model, channel.size, rules, *example)
        verified = tensor_parallel.verify_plan(model, channel, proposed, *example)
        self._parallelized = tensor_parallel.parallelize(model, channel, verified)
        placements.readable.guard_split(self._parallelized)
        for name, cut in self._parallelized.cuts.items():
            placements.record(name, cut=cut)
            placements.release(name)

    def dry_run(self) -> contextlib.AbstractContextManager[None]:
        """See `MeshAxis`."""
        return tensor_parallel.dry_run(self._parallelized)

    def close(self) -> None:
        """See `MeshAxis`."""
        if self._parallelized is not None:
            self._parallelized.restore()
