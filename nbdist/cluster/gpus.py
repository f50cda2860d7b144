"""How many GPUs there are, asked of torch only where there may be some."""

from __future__ import annotations

import sys

from nbdist.cluster import current, fork_server
from nbdist.plan import may_have_gpus

__all__ = ["count_gpus"]


def count_gpus() -> int:
    """The GPUs of this host that torch sees."""
    if "torch" not in sys.modules and not may_have_gpus():
        return 0
    if fork_server.can_fork() and current.current_cluster() is None:
        fork_server.require_server()  # it loads torch while we do
    import torch

    return torch.cuda.device_count()
