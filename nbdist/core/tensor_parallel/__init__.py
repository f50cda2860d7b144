"""Tensor parallelism: single layers are split, and the ranks of the `tp` axis compute them together.

`derive` proposes a plan (or `written` reads one that a person wrote), `prove` keeps of it what leaves results as they
are, and `parallelize` applies it.
"""

from nbdist.core.tensor_parallel.apply import Parallelized, parallelize
from nbdist.core.tensor_parallel.derive import derive
from nbdist.core.tensor_parallel.guard import Guard
from nbdist.core.tensor_parallel.plan import Group, TensorPlan
from nbdist.core.tensor_parallel.proof import prove
from nbdist.core.tensor_parallel.rehearsal import rehearsed
from nbdist.core.tensor_parallel.rules import written

__all__ = ["Group", "Guard", "Parallelized", "TensorPlan", "derive", "parallelize", "prove", "rehearsed", "written"]
