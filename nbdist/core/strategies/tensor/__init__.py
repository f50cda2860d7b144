"""Tensor parallelism: single layers are split, and the ranks of the `tp` axis compute them together.

`derive` proposes a plan (or `written` reads one that a user wrote), `prove` keeps of it what leaves results as they
are, and `parallelize` applies it.
"""

from nbdist.core.strategies.tensor.apply import Parallelized, parallelize
from nbdist.core.strategies.tensor.auto_plan import derive
from nbdist.core.strategies.tensor.dry_run import dry_run
from nbdist.core.strategies.tensor.guard import Guard
from nbdist.core.strategies.tensor.plan import Group, TensorPlan
from nbdist.core.strategies.tensor.user_plan import written
from nbdist.core.strategies.tensor.verify import prove

__all__ = ["Group", "Guard", "Parallelized", "TensorPlan", "derive", "dry_run", "parallelize", "prove", "written"]
