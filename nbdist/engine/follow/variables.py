"""Environment variables that engines take over from the notebook: all that are not a process's own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

__all__ = ["set_variables", "variables"]

_OWN = {
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "GROUP_RANK", "GROUP_WORLD_SIZE", "HIP_VISIBLE_DEVICES", "HOSTNAME",
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MKL_DYNAMIC", "MKL_NUM_THREADS", "NCCL_SOCKET_IFNAME", "NODE_RANK",
    "NUMEXPR_MAX_THREADS", "NUMEXPR_NUM_THREADS", "NVIDIA_VISIBLE_DEVICES", "OPENBLAS_NUM_THREADS", "RANK",
    "ROCR_VISIBLE_DEVICES", "TP_SOCKET_IFNAME", "VECLIB_MAXIMUM_THREADS", "WORLD_SIZE", "ZE_AFFINITY_MASK", "_",
}  # fmt: skip
_OWN_PREFIXES = (
    "BLIS_", "GOMP_", "GOTO_", "IPP_", "JPY_", "KMP_", "MASTER_", "NBDIST_", "OMP_", "PET_", "PYDEVD_", "PYTEST_",
    "ROLE_", "SLURM_", "TORCHELASTIC_", "TORCH_NCCL_",
)  # fmt: skip
"""Of rendezvous, devices and threads; and what nbdist and Jupyter give each process."""


def variables() -> dict[str, str]:
    """The environment variables of this process, but for those that are its own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OWN and not name.startswith(_OWN_PREFIXES)
    }  # fmt: skip


def set_variables(changed: Mapping[str, str | None]) -> None:
    """Set environment variables, and remove those that are None; the time zone follows."""
    for name, value in changed.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "TZ" in changed and hasattr(time, "tzset"):
        time.tzset()
