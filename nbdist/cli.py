"""The command line: ``nbdist demo``, ``nbdist doctor``, ``nbdist version``."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import nbdist
from nbdist.errors import NbdistError, PlanError, suggest
from nbdist.plan import available_cores
from nbdist.plan.arguments import OptionParser, add_options, given_options
from nbdist.plan.plan import OPTIONS

__all__ = ["main"]

_PACKAGES = (
    "torch",
    "numpy",
    "ipyparallel",
    "ipykernel",
    "ipython",
    "anywidget",
    "ipywidgets",
    "cloudpickle",
    "psutil",
)
_DEMO = Path("notebooks") / "00_quickstart.ipynb"


def main(words: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 for success, 1 for an error, 2 for a wrong command line."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "demo": _demo,
        "version": _version,
        "doctor": _doctor,
        "nbval-sanitize": _nbval_sanitize,
    }
    words = sys.argv[1:] if words is None else words
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_USAGE)
            return 0
        if words[0] not in commands:
            raise PlanError(f"unknown command {words[0]!r}: use {', '.join(commands)}.{suggest(words[0], commands)}")
        return commands[words[0]](words[1:])
    except NbdistError as error:
        print(f"nbdist: {error}", file=sys.stderr)
        return 2 if isinstance(error, PlanError) else 1


_USAGE = """usage: nbdist demo [-n N] [NOTEBOOK]    train on real data from a notebook, here and now
       nbdist doctor [-n N] [OPTIONS]   check that engines start, communicate and train on this machine
       nbdist doctor --hosts h1:2,h2:2  the same on other hosts, after a look at each thing that they need
       nbdist version                   print the version
       nbdist nbval-sanitize            print the file for pytest --nbval --nbval-sanitize-with FILE"""


def _version(words: list[str]) -> int:
    OptionParser("nbdist version", "Print the version.").parse(words)
    print(f"nbdist {nbdist.__version__}")
    return 0


def _nbval_sanitize(words: list[str]) -> int:
    OptionParser("nbdist nbval-sanitize", "Print the path of the file that hides varying output from nbval.").parse(
        words
    )
    print(Path(__file__).parent / "notebook" / "nbval_sanitize.cfg")
    return 0


def _doctor(words: list[str]) -> int:
    parser = OptionParser("nbdist doctor", "Check that engines start, communicate and train on this machine.")
    parser.add_argument("-n", type=int, metavar="N", help="Engines.")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="What ranks compute on.")
    parser.add_argument(
        "--hosts", metavar="H,...", help="Examine these hosts: ssh, versions, connections both ways, clock, folder."
    )
    parser.add_argument("--interface", metavar="NAME", help="This host's network interface towards them.")
    parser.add_argument(
        "--folder", default="", metavar="DIR", help="That all hosts should see. Default: the present one."
    )
    options = {name: option for name, option in OPTIONS.items() if option.read != "callable" or name == "optimizer"}
    add_options(parser, options)
    arguments = parser.parse(words)
    print(f"nbdist {nbdist.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in _PACKAGES:
        print(f"  {package:<12} {importlib.metadata.version(package)}")
    import torch

    from nbdist.cluster import Cluster
    from nbdist.cluster.hosts.host_choice import parse_hosts

    gpus = torch.cuda.device_count()
    print(f"  {available_cores()} cores, {gpus} GPU{'' if gpus == 1 else 's'}")
    hosts = None if arguments.hosts is None else parse_hosts(arguments.hosts)
    others = [name for name in hosts or () if name != "local"]
    if others and not _examine(others, arguments.interface, arguments.folder):
        return 1
    chosen = {"device": arguments.device, "hosts": hosts, "interface": arguments.interface if others else None}
    with Cluster(arguments.n, **chosen) as cluster:
        print(
            f"{cluster.size} engines started and completed a collective in {cluster.start_seconds:.1f} s: {cluster!r}"
        )
        layer, data = torch.nn.Linear(4, 1), (torch.randn(256, 4), torch.randn(256, 1))
        run = cluster.train(layer, data, loss="mse", **given_options(arguments, options))
        print(f"a training of {run.history[-1]['steps']} steps {run.state}: all is well")
    return 0


def _examine(hosts: list[str], interface: str | None, folder: str) -> bool:
    """Print what is found about hosts; returns whether engines can run there."""
    from nbdist.cluster.hosts.doctor import examine_hosts
    from nbdist.cluster.hosts.ssh import Ssh

    failed = 0
    for finding in examine_hosts(Ssh.of_user(), hosts, interface, folder):
        print(finding, flush=True)
        failed += finding.kind == "FAILED"
    if failed:
        print(f"{failed} of these must be mended before engines can run there")
    return not failed


def _demo(words: list[str]) -> int:
    parser = OptionParser("nbdist demo", "Run a notebook and print its results.")
    parser.add_argument("notebook", nargs="?", type=Path, default=_DEMO)
    parser.add_argument("-n", type=int, metavar="N", help="Engines.")
    arguments = parser.parse(words)
    from nbdist.demo import run_demo

    return run_demo(arguments.notebook, arguments.n)
