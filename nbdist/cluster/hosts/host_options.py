"""The options that say on which hosts engines are started, and how those are reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from nbdist.cluster.hosts.host_choice import LAUNCHERS, parse_hosts
from nbdist.plan.option import Option

__all__ = ["HOST_OPTIONS", "HostOptions"]


def _unquoted(text: str) -> str:
    """What stands in quotes, which a magic's line keeps."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


HOST_OPTIONS: dict[str, Option] = {
    "hosts": Option(
        help="Hosts by their names for ssh, with the number of engines on each, such as h1:2,h2:2,local:2 (local: this "
        "one). Without a number: one a GPU, else one a core up to 4.",
        parse=parse_hosts,  # type: ignore[arg-type]
        metavar="H:N,...",
    ),
    "launcher": Option(
        help="How other hosts are reached. slurm: the nodes of the job that this notebook is in, else of one that is "
        "asked for.",
        metavar="|".join(LAUNCHERS),
        default="ssh",
        words=LAUNCHERS,
    ),
    "nodes": Option(
        help="With slurm, how many of them; the number of engines is that in all.", parse=int, metavar="N", default="1"
    ),
    "launcher_args": Option(
        help='For ssh, mpiexec, or salloc of a new job, in quotes: "--partition gpu --time 2:00:00".',
        parse=_unquoted,  # type: ignore[arg-type]
        metavar="ARGS",
    ),
    "connect": Option(
        help="The connection file of an ipyparallel cluster that runs: engines are started on its hosts, as many as it "
        "has there, and its own are left alone.",
        metavar="FILE",
    ),
    "profile": Option(help="The same, by the name of its IPython profile.", metavar="NAME"),
    "interface": Option(
        help="This host's network interface towards the others, or its address.",
        metavar="NAME",
        default="the one to them",
    ),
    "ports": Option(
        help="The TCP ports that nbdist listens on, here and on the other hosts, where a firewall lets only these "
        "through: 40 or more, such as 10101-10160.",
        metavar="A-B",
        default="any free ones",
    ),
    "tunnel": Option(
        help="Whether ssh carries all connections between hosts, where a firewall lets nothing else through; on CPUs.",
        parse=bool,
        bare=True,
        default="no",
    ),
    "host_timeout": Option(
        help="Seconds without a word after which a host counts as lost.", parse=float, metavar="S", default="3"
    ),
}
"""By name, in the order of help texts."""


class HostOptions(TypedDict, total=False):
    """The types of `HOST_OPTIONS`, for type checkers. None is as good as not given."""

    hosts: Mapping[str, int | None] | None
    launcher: str | None
    nodes: int | None
    launcher_args: str | None
    connect: str | None
    profile: str | None
    interface: str | None
    ports: str | None
    tunnel: bool | None
    host_timeout: float | None
