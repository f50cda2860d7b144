"""Device and engine count: counts GPUs, with torch only where there may be some."""

from __future__ import annotations

import sys

from nbdist.cluster.launch import fork_client
from nbdist.errors import PlanError, suggest
from nbdist.plan import available_cores, check_engines, default_engines, may_have_gpus

__all__ = ["choose_size"]

_DEVICES = ("auto", "cpu", "cuda")


def choose_size(engines: int | None, device: str, *, warm_up: bool) -> int:
    """The number of engines to start.

    Args:
        engines: The requested number; None for the default.
        device: "auto", "cpu" or "cuda".
        warm_up: Whether engines are about to start, so that the fork server may load torch while this looks for GPUs.

    Raises:
        PlanError: A number or the device is not possible.
    """
    if device not in _DEVICES:
        raise PlanError(f"unknown device {device!r}: use auto, cpu or cuda.{suggest(device, _DEVICES)}")
    gpus = 0 if device == "cpu" else _count_gpus(warm_up)
    if device == "cuda" and not gpus:
        raise PlanError("device 'cuda' was asked for, but torch sees no GPU here: use cpu or auto.")
    cores = available_cores()
    size = default_engines(cores, gpus) if engines is None else engines
    check_engines(size, cores, gpus)
    return size


def _count_gpus(warm_up: bool) -> int:
    """The number of GPUs of this host that torch sees."""
    if "torch" not in sys.modules and not may_have_gpus():
        return 0
    if warm_up and fork_client.can_fork():
        fork_client.require_server()  # it loads torch at the same time
    import torch

    return torch.cuda.device_count()
