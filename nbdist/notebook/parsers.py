"""The arguments of each magic, as argparse parsers."""

from __future__ import annotations

import functools

from nbdist.cluster import HOST_OPTIONS
from nbdist.cluster.runs.run_spec import RUN_OPTIONS
from nbdist.errors import PlanError
from nbdist.plan.arguments import OptionParser, add_options
from nbdist.plan.predict_options import PREDICT_OPTIONS
from nbdist.plan.train_options import TRAIN_OPTIONS
from nbdist.telemetry.command_table import COMMANDS

__all__ = [
    "ATTACH", "CLUSTERS", "COMPARE", "DEBUG", "DIST", "EXPORT", "HELP", "LINE_OPTIONS", "PARSERS", "PREDICT", "PULL",
    "PUSH", "RUN", "RUNS", "RUN_COMMANDS", "SCALE", "START", "STATUS", "STOP", "TRAIN", "WHERE", "parse_ranks",
]  # fmt: skip

RUN_COMMANDS = tuple(name for name, kind in COMMANDS.items() if kind.usage)
"""The commands of ``%dist_run``."""
LINE_OPTIONS = {name: option for name, option in (TRAIN_OPTIONS | RUN_OPTIONS).items() if name != "step"}
"""The options of ``%dist_train``, whose cell is the step."""


_Parser = functools.partial(OptionParser, expressions=True)


def _start_parser() -> OptionParser:
    parser = _Parser("%dist_start", "Start engines, one rank each, and report them. Can be called twice.")
    parser.add_argument("-n", type=int, metavar="N", help="Engines. Default: one a GPU, else one a core up to 4.")
    add_options(parser, HOST_OPTIONS)
    parser.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda", help="What ranks compute on. Default: auto."
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="Seconds the start may take. Default: 60."
    )
    parser.add_argument(
        "--spares", type=int, metavar="N", help="Spare engines, which replace lost ones at once. Default: 1."
    )
    parser.add_argument(
        "--detach", type=float, nargs="?", const=3600.0, metavar="S",
        help="Let engines and training outlive this kernel for S seconds (3600 if S is left out), until %%dist_attach "
        "in another kernel. Default: they end with it.",
    )  # fmt: skip
    return parser


def _attach_parser() -> OptionParser:
    parser = _Parser(
        "%dist_attach",
        "Take over a detached cluster whose kernel has ended: its engines with all their variables, and the newest run "
        "with its panel. The model is assigned to its name here, or receives the weights if it exists. "
        "Returns the Run.",
    )
    parser.add_argument("name", nargs="?", metavar="ID", help="Which cluster; needed if there are several.")
    parser.add_argument("-o", dest="output", metavar="NAME", help="Store the Run under this name too.")
    return parser


def _clusters_parser() -> OptionParser:
    return _Parser("%dist_clusters", "List the running detached clusters, and how long each still waits for a kernel.")


def _status_parser() -> OptionParser:
    return _Parser(
        "%dist_status",
        "Show the engines (rank, process, host, device, state, memory), the newest run, and the fork server.",
    )


def _where_parser() -> OptionParser:
    return _Parser(
        "%dist_where",
        "Show the line and the collective that every rank is in, and which rank waits for which. Disturbs no run. "
        "During a run it needs --background or a subshell, as any other cell does.",
    )


def _scale_parser() -> OptionParser:
    parser = _Parser(
        "%dist_scale",
        "Scale to N engines: engines are added or the last ones removed, the others keep their variables. A running "
        "training scales after the current step, with the same global batch.",
    )
    parser.add_argument("n", type=int, metavar="N", help="How many.")
    return parser


def _debug_parser() -> OptionParser:
    parser = _Parser(
        "%dist_debug",
        "Post-mortem pdb on the last error of a run or a cell on a rank: it begins on your own line; up, down, "
        "p NAME, l, and q to quit. The other ranks stay free.",
    )
    parser.add_argument("rank", type=int, metavar="RANK", help="The rank that failed.")
    return parser


def _stop_parser() -> OptionParser:
    parser = _Parser("%dist_stop", "Stop the engines. Can be called twice.")
    parser.add_argument(
        "--all",
        action="store_true",
        help="Also end the fork server, and the agents on other hosts, which make the next start quicker.",
    )
    return parser


def _dist_parser() -> OptionParser:
    parser = _Parser("%%dist", "Run the cell on engines, which have `rank`, `world_size` and `device`.")
    parser.add_argument("--ranks", metavar="0,2-3", help="The ranks that run it. Default: all ranks.")
    parser.add_argument("--local", action="store_true", help="First run it in the notebook too.")
    return parser


def _push_parser() -> OptionParser:
    parser = _Parser("%dist_push", "Send values of the notebook to every engine, under the same names.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="Names in the notebook.")
    return parser


def _pull_parser() -> OptionParser:
    parser = _Parser("%dist_pull", "Return the value of a name on one engine.")
    parser.add_argument("name", metavar="NAME", help="A name on the engine.")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="Which engine. Default: 0.")
    return parser


def _train_parser() -> OptionParser:
    parser = _Parser(
        "%dist_train",
        "Train MODEL on DATA on all engines; the notebook's own MODEL then holds the trained weights. Returns a Run. "
        "As a cell magic the body is one training step: it sees `model` and `batch` and assigns `loss`, a mean "
        "(and `weight`, what that mean is over, if that is not samples, and `log`, a dict of numbers to follow). "
        "Numbers and words may be expressions of the notebook: --lr rate, --epochs config.epochs.",
        usage="%%dist_train MODEL DATA [OPTIONS]\n"
        "       %%dist_train --resume [OPTIONS]        (continues the last run)\n"
        "       %%%%dist_train MODEL DATA [OPTIONS]   (the cell is one step)",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="A name or expression: a torch.nn.Module, a dict, list or tuple of them, or a function that "
        "builds one too large for memory.",
    )  # fmt: skip
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help="A name or expression: a Dataset, a DataLoader, (X, y)."
    )
    add_options(parser, {name: option for name, option in LINE_OPTIONS.items() if name not in RUN_OPTIONS})
    parser.add_argument("--background", action="store_true", help="Return at once; the run continues.")
    add_options(parser, RUN_OPTIONS)
    parser.add_argument("-o", dest="output", metavar="NAME", help="Store the Run under this name too.")
    return parser


def _predict_parser() -> OptionParser:
    parser = _Parser(
        "%dist_predict",
        "Return MODEL's outputs for DATA, in its order: every sample once, shared over all engines, on the CPU. MODEL "
        "is in evaluation mode, and stays as it is. The last element of a tuple (x, y) is the target, and left out.",
    )
    parser.add_argument("model", metavar="MODEL", help="A name or expression: a torch.nn.Module.")
    parser.add_argument("data", metavar="DATA", help="A name or expression: a Dataset, a DataLoader, (X, y), a tensor.")
    add_options(parser, PREDICT_OPTIONS)
    parser.add_argument(
        "-o", dest="output", metavar="NAME", help="Store the outputs under this name, and show nothing."
    )
    return parser


def _run_parser() -> OptionParser:
    parser = _Parser(
        "%dist_run",
        f"Show the newest run, or send it a command, which all ranks apply after the same step: "
        f"{', '.join(COMMANDS[name].usage for name in RUN_COMMANDS)}. None of them loses a step. A command after the "
        f"last step has no effect, and the run's notes say so.",
    )
    parser.add_argument(
        "command", nargs="?", choices=RUN_COMMANDS, metavar="|".join(RUN_COMMANDS),
        help="The command. Default: show the run.",
    )  # fmt: skip
    values = {kind.value: kind.value_help for name in RUN_COMMANDS if (kind := COMMANDS[name]).value}
    text = ", or ".join(values.values())
    parser.add_argument("value", nargs="?", metavar="|".join(values), help=f"{text[0].upper()}{text[1:]}.")
    return parser


def _runs_parser() -> OptionParser:
    parser = _Parser("%dist_runs", "List the recorded runs, the newest first, or show one. Needs no engines.")
    parser.add_argument(
        "run_id", nargs="?", metavar="RUN_ID", help="The run to show; the beginning of its name is enough."
    )
    parser.add_argument("-n", type=int, default=10, metavar="N", help="How many to list. Default: 10.")
    return parser


def _compare_parser() -> OptionParser:
    parser = _Parser(
        "%dist_compare",
        "Compare runs, running or past: the options that differ, the best epoch of each, and their curves. Returns a "
        "Comparison. Needs no engines.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN",
        help="A name or expression: a Run, a dict or list of Runs; or the name of a recorded run. Default: the newest.",
    )  # fmt: skip
    parser.add_argument("-n", type=int, default=5, metavar="N", help="How many of the newest. Default: 5.")
    return parser


def _export_parser() -> OptionParser:
    parser = _Parser(
        "%dist_export",
        "Write the newest run as a plain Python script, which trains to the same bits under torchrun: the statements "
        "of your cells that it needs, its step, and its call. Where they do not make its first weights or its data "
        "again, a file beside it has them.",
    )
    parser.add_argument("file", metavar="FILE", help="The script, such as train.py.")
    return parser


def _help_parser() -> OptionParser:
    parser = _Parser("%dist_help", "Show all magics, or all about one of them.")
    parser.add_argument("magic", nargs="?", metavar="MAGIC", help="Which, such as dist_train.")
    return parser


ATTACH = _attach_parser()
CLUSTERS = _clusters_parser()
COMPARE = _compare_parser()
DEBUG = _debug_parser()
SCALE = _scale_parser()
START = _start_parser()
STATUS = _status_parser()
STOP = _stop_parser()
DIST = _dist_parser()
EXPORT = _export_parser()
HELP = _help_parser()
PUSH = _push_parser()
PREDICT = _predict_parser()
PULL = _pull_parser()
RUN = _run_parser()
RUNS = _runs_parser()
TRAIN = _train_parser()
WHERE = _where_parser()

PARSERS: dict[str, OptionParser] = {
    parser.prog: parser
    for parser in (
        START,
        TRAIN,
        PREDICT,
        RUN,
        RUNS,
        COMPARE,
        EXPORT,
        DIST,
        PUSH,
        PULL,
        STATUS,
        SCALE,
        WHERE,
        DEBUG,
        ATTACH,
        CLUSTERS,
        STOP,
        HELP,
    )
} | {"%%dist_train": TRAIN}
"""By the word that begins the line, in the order of a first session."""


def parse_ranks(text: str, size: int) -> list[int]:
    """Read "0,2-3".

    Raises:
        PlanError: It is no list of ranks below `size`.
    """
    ranks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and (not last.isdigit() or int(last) < int(first))):
            raise PlanError(f"--ranks {text!r} is not a list of ranks: write it like 0,2-3.")
        ranks += range(int(first), int(last or first) + 1)
    wrong = [rank for rank in ranks if rank >= size]
    if wrong:
        raise PlanError(f"rank {wrong[0]} does not exist: use 0 to {size - 1}.")
    return sorted(set(ranks))
