"""The command line: ``nbdist demo``, ``nbdist doctor``, ``nbdist version``."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbdist
from nbdist.errors import NbdistError, PlanError, suggest
from nbdist.listening import use_ports
from nbdist.plan import available_cores
from nbdist.plan.arguments import OptionParser, add_options, given_options
from nbdist.plan.plan import OPTIONS

if TYPE_CHECKING:
    from nbdist.cluster.hosts.host_choice import HostChoice

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
    from nbdist.cluster import HOST_OPTIONS

    add_options(parser, HOST_OPTIONS)
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
    from nbdist.cluster.launch.devices import named_hosts

    gpus = torch.cuda.device_count()
    print(f"  {available_cores()} cores, {gpus} GPU{'' if gpus == 1 else 's'}")
    chosen: Any = given_options(arguments, HOST_OPTIONS)
    if not _examine(named_hosts(arguments.n, arguments.device, options=chosen), arguments.folder):
        return 1
    with Cluster(arguments.n, device=arguments.device, **chosen) as cluster:
        print(
            f"{cluster.size} engines started and completed a collective in {cluster.start_seconds:.1f} s: {cluster!r}"
        )
        layer, data = torch.nn.Linear(4, 1), (torch.randn(256, 4), torch.randn(256, 1))
        run = cluster.train(layer, data, loss="mse", **given_options(arguments, options))
        print(f"a training of {run.history[-1]['steps']} steps {run.state}: all is well")
    return 0


def _examine(choice: HostChoice, folder: str) -> bool:
    """Print what is found about other hosts; returns whether engines can run there."""
    from nbdist.cluster.hosts.doctor import examine_hosts
    from nbdist.cluster.launch.agent_launchers import allocation_of, way_to_hosts

    if not choice.elsewhere or choice.connect:  # its engines pass on no answers
        return True
    allocation = allocation_of(choice, print)
    failed = 0
    try:
        hosts = choice.others if allocation is None else [name for name in allocation.engines(None) if name != "local"]
        launcher, ports = way_to_hosts(choice, allocation)
        use_ports(ports)
        for finding in examine_hosts(launcher, hosts, choice.interface, folder):
            print(finding, flush=True)
            failed += finding.kind == "FAILED"
    finally:
        if allocation is not None:
            allocation.end()
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
