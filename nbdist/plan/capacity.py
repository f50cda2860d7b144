"""The machine's capacity: CPU cores, memory, GPUs, and how many engines make sense."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nbdist.errors import PlanError

__all__ = ["available_bytes", "available_cores", "check_engines", "default_engines", "may_have_gpus"]

_DEFAULT_AT_MOST = 4
_ENGINES_A_CORE = 4
_ENGINES_A_GPU = 8
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/dxg", "/dev/kfd")  # NVIDIA, Tegra, under Windows; AMD
_LIMIT_VARIABLE = "NBDIST_MAX_ENGINES"


def available_cores() -> int:
    """CPU cores that this process may use: affinity, the container's quota and a job of Slurm may allow fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allocated = os.environ.get("SLURM_CPUS_ON_NODE", "")  # sites need not bind a job to its cores
    cores = min(cores, int(allocated)) if allocated.isdigit() and int(allocated) else cores
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def available_bytes() -> int | None:
    """Free memory in bytes, of the host and within the container's limit; None if unknown."""
    free = [found for found in (_free_on_host(), _free_in_container()) if found is not None]
    return min(free, default=None)


def _free_on_host() -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _free_in_container() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(counts["inactive_file"])  # the page cache, which the kernel frees on demand
    except (OSError, ValueError, KeyError):  # no container, or no limit
        return None


def may_have_gpus() -> bool:
    """Whether a GPU driver is loaded; only torch can count GPUs, and importing it takes long if there are none."""
    return sys.platform == "win32" or any(Path(device).exists() for device in _GPU_DEVICES)


def default_engines(cores: int, gpus: int) -> int:
    """One engine a GPU, else one a core up to four; never more than ``$NBDIST_MAX_ENGINES``."""
    return min(gpus or min(cores, _DEFAULT_AT_MOST), _limit(cores, gpus))


def check_engines(engines: int, cores: int, gpus: int, machine: str = "this machine") -> None:
    """Refuse a number of engines that cannot be intended.

    Args:
        engines: How many.
        cores: Of the machine.
        gpus: Of the machine.
        machine: What errors call it.

    Raises:
        PlanError: It is no whole number, below one, or above the limit for `cores` and `gpus`.
    """
    if isinstance(engines, bool) or not isinstance(engines, int):
        raise PlanError(f"engines must be a whole number, not {engines!r}.")
    if engines < 1:
        raise PlanError(f"{engines} engines is too few: use 1 or more.")
    limit = _limit(cores, gpus)
    if engines > limit:
        raise PlanError(
            f"{engines} engines are more than {machine} can run ({cores} cores, "
            f"{gpus} GPU{'' if gpus == 1 else 's'}): use {limit} or fewer."
        )


def _limit(cores: int, gpus: int) -> int:
    given = os.environ.get(_LIMIT_VARIABLE, "")
    return int(given) if given.isdigit() and int(given) else max(cores * _ENGINES_A_CORE, gpus * _ENGINES_A_GPU)
