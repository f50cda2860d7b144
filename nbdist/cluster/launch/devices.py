"""Device and engine count: counts GPUs, with torch only where there may be some."""

from __future__ import annotations

import shlex
import sys

from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.host_choice import LOCAL, HostChoice
from nbdist.cluster.hosts.host_options import HOST_OPTIONS, HostOptions
from nbdist.cluster.hosts.running_cluster import connection_file
from nbdist.cluster.hosts.slurm import check_slurm
from nbdist.cluster.launch.agent_launchers import launcher_of
from nbdist.cluster.launch.anchor_client import check_detach
from nbdist.errors import PlanError, suggest
from nbdist.plan import available_cores, check_engines, default_engines, may_have_gpus
from nbdist.plan.option import check_known

__all__ = ["choose_hosts", "named_hosts"]

_DEVICES = ("auto", "cpu", "cuda")


def choose_hosts(
    engines: int | None, device: str, *, warm_up: bool, detach: float | None = None, options: HostOptions
) -> HostChoice:
    """How many engines to start on which hosts. The number of this one is chosen here, where none is given.

    Args:
        engines: The requested number; None for the default.
        device: "auto", "cpu" or "cuda".
        warm_up: Whether engines are about to start, so that the fork server may load torch while this looks for GPUs.
        detach: How long they outlive this kernel, in seconds; None if they do not.
        options: See `HOST_OPTIONS`.

    Raises:
        PlanError: A number, a host or the device is not possible.
    """
    choice = named_hosts(engines, device, warm_up=warm_up, options=options)
    if detach is not None:
        check_detach(detach)
    if choice.by_slurm:
        check_slurm(choice.launcher_args, detach is not None)
    elif choice.others and not choice.allocated and not choice.tunnel:  # an unknown host is named before anything ends
        launcher_of(choice).address_towards(choice.others, choice.interface)
    return choice


def named_hosts(engines: int | None, device: str, *, warm_up: bool = False, options: HostOptions) -> HostChoice:
    """As `choose_hosts`; but the others are not looked up."""
    check_known(options, HOST_OPTIONS)
    if device not in _DEVICES:
        raise PlanError(f"unknown device {device!r}: use auto, cpu or cuda.{suggest(device, _DEVICES)}")
    hosts, connect, profile = options.get("hosts"), options.get("connect"), options.get("profile")
    launcher = options.get("launcher") or "ssh"
    if hosts is not None and engines is not None:
        raise PlanError("engines and hosts exclude each other: say how many on each host, such as h1:2,h2:2.")
    if launcher == "slurm" and hosts is not None:
        raise PlanError("Slurm chooses the hosts: say how many nodes (--nodes 2), and with -n how many engines in all.")
    if connect is not None and profile is not None:
        raise PlanError("connect and profile exclude each other: each names a cluster that runs.")
    allocated = launcher == "slurm" or connect is not None or profile is not None
    counts = dict(hosts or {}) if allocated or hosts is not None else {LOCAL: engines}
    if LOCAL in counts:
        counts[LOCAL] = _size(counts[LOCAL], device, warm_up)
    given = tuple(shlex.split(options.get("launcher_args") or ""))
    return HostChoice(
        engines=counts, total=engines if allocated else None, device=device, launcher=launcher, launcher_args=given,
        nodes=options.get("nodes"), interface=options.get("interface"), ports=options.get("ports") or "",
        tunnel=bool(options.get("tunnel")), timeout_s=options.get("host_timeout"),
        connect="" if connect is None and profile is None else connection_file(connect, profile),
    )  # fmt: skip


def _size(engines: int | None, device: str, warm_up: bool) -> int:
    """The number of engines on this host."""
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
