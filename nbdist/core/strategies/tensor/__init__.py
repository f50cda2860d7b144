"""Tensor parallelism: column- and row-split layers that the ranks of the `tp` axis compute together.

`derive_plan` proposes a plan, or `plan_from_rules` reads the user's. `verify_plan` verifies it numerically and keeps
the groups that leave results unchanged. `parallelize` applies it.
"""

from nbdist.core.strategies.tensor.apply import Parallelized, parallelize
from nbdist.core.strategies.tensor.auto_plan import derive_plan
from nbdist.core.strategies.tensor.dry_run import dry_run
from nbdist.core.strategies.tensor.guard import Guard
from nbdist.core.strategies.tensor.plan import Group, TensorPlan, cuts
from nbdist.core.strategies.tensor.user_plan import plan_from_rules
from nbdist.core.strategies.tensor.verify import verify_plan

__all__ = [
    "Group",
    "Guard",
    "Parallelized",
    "TensorPlan",
    "cuts",
    "derive_plan",
    "dry_run",
    "parallelize",
    "plan_from_rules",
    "verify_plan",
]
