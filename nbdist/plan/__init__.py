"""WHAT to run: the mesh, the batch sizes, every option; all arithmetic and validation. Standard library only."""

from nbdist.plan.capacity import available_bytes, available_cores, check_engines, default_engines, may_have_gpus
from nbdist.plan.mesh import Mesh
from nbdist.plan.plan import Plan
from nbdist.plan.slices import slice_bounds

__all__ = [
    "Mesh",
    "Plan",
    "available_bytes",
    "available_cores",
    "check_engines",
    "default_engines",
    "may_have_gpus",
    "slice_bounds",
]
