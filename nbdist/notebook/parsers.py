"""The arguments of each magic."""

from __future__ import annotations

from nbdist.cluster.diagnose.hangs import ON_HANG
from nbdist.cluster.runs.run import ON_FAILURE
from nbdist.errors import PlanError
from nbdist.plan.arguments import OptionParser, add_plan_options

__all__ = [
    "ATTACH", "CLUSTERS", "DEBUG", "DIST", "HELP", "ORDERS", "PARSERS", "PULL", "PUSH", "RUN", "RUNS", "SCALE", "START",
    "STATUS", "STOP", "TRAIN", "WHERE", "parse_ranks",
]  # fmt: skip


def _start_parser() -> OptionParser:
    parser = OptionParser("%dist_start", "Start engines, one rank each; says what it started. Twice is fine.")
    parser.add_argument("-n", type=int, metavar="N", help="Engines. Default: one a GPU, else one a core up to 4.")
    parser.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda", help="What ranks compute on. Default: auto."
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="Seconds the start may take. Default: 60."
    )
    parser.add_argument(
        "--spares", type=int, metavar="N", help="Idle engines to take the place of lost ones at once. Default: 1."
    )
    parser.add_argument(
        "--detach", type=float, nargs="?", const=3600.0, metavar="S",
        help="Let engines and training outlive this kernel, without one for S seconds (3600 where S is left away), "
        "until %%dist_attach in another. Default: they end with it.",
    )  # fmt: skip
    return parser


def _attach_parser() -> OptionParser:
    parser = OptionParser(
        "%dist_attach",
        "Take over a detached cluster whose kernel has ended: engines, what %%dist and %dist_push told them, and the "
        "newest run with its panel. Its model stands here under its name, or gets the weights if it is here already. "
        "Returns the Run.",
    )
    parser.add_argument("name", nargs="?", metavar="ID", help="Which; needed where there are several.")
    parser.add_argument("-o", dest="output", metavar="NAME", help="Store the Run under this name too.")
    return parser


def _clusters_parser() -> OptionParser:
    return OptionParser(
        "%dist_clusters", "List the detached clusters that live, and how long each one waits for a kernel."
    )


def _status_parser() -> OptionParser:
    return OptionParser(
        "%dist_status",
        "Show the engines (rank, process, host, device, state, memory), the newest run, and what is kept warm.",
    )


def _where_parser() -> OptionParser:
    return OptionParser(
        "%dist_where",
        "Show on which line every rank is, in which collective, and who waits for whom. Disturbs nobody. A run needs "
        "--background for it, or a subshell, as for any other cell.",
    )


def _scale_parser() -> OptionParser:
    parser = OptionParser(
        "%dist_scale",
        "Have N engines from now on: some join or the last ones leave, the others keep what they hold. A run that goes "
        "on does it after the step it is in, with the same global batch.",
    )
    parser.add_argument("n", type=int, metavar="N", help="How many.")
    return parser


def _debug_parser() -> OptionParser:
    parser = OptionParser(
        "%dist_debug",
        "Look at what failed last on a rank, a run or a cell, with pdb: it begins on your own line there; up, down, "
        "p NAME, l, and q to leave. The other ranks are free meanwhile.",
    )
    parser.add_argument("rank", type=int, metavar="RANK", help="Where it failed.")
    return parser


def _stop_parser() -> OptionParser:
    parser = OptionParser("%dist_stop", "End the engines. Twice is fine.")
    parser.add_argument(
        "--all", action="store_true", help="Also the fork server, which is kept for a quicker next start."
    )
    return parser


def _dist_parser() -> OptionParser:
    parser = OptionParser("%%dist", "Run the cell on engines, which have `rank`, `world_size` and `device`.")
    parser.add_argument("--ranks", metavar="0,2-3", help="Where to run. Default: all ranks.")
    parser.add_argument("--local", action="store_true", help="Run it in the notebook too, first.")
    return parser


def _push_parser() -> OptionParser:
    parser = OptionParser("%dist_push", "Send values of the notebook to every engine, under the same names.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="Names in the notebook.")
    return parser


def _pull_parser() -> OptionParser:
    parser = OptionParser("%dist_pull", "Return the value of a name on one engine.")
    parser.add_argument("name", metavar="NAME", help="A name on the engine.")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="Which engine. Default: 0.")
    return parser


def _train_parser() -> OptionParser:
    parser = OptionParser(
        "%dist_train",
        "Train MODEL on DATA on all engines; the notebook's own MODEL then holds the trained weights. Returns a Run. "
        "As a cell magic the body is one training step: it sees `model` and `batch` and assigns `loss`, a mean "
        "(and `weight`, what that mean is over, if that is not samples).",
        usage="%%dist_train MODEL DATA [OPTIONS]\n"
        "       %%dist_train --resume [OPTIONS]        (goes on with the last run)\n"
        "       %%%%dist_train MODEL DATA [OPTIONS]   (the cell is one step)",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A name or expression: a torch.nn.Module.")
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help="A name or expression: a Dataset, a DataLoader, (X, y)."
    )
    parser.add_argument("--val", metavar="DATA", help="Validation data, in the same forms.")
    add_plan_options(parser)
    parser.add_argument("--background", action="store_true", help="Return at once; the run goes on.")
    parser.add_argument(
        "--hang-timeout", type=float, metavar="S",
        help="Seconds without a step, evaluation included, after which the run hangs. Default: no limit.",
    )  # fmt: skip
    parser.add_argument(
        "--on-hang", choices=ON_HANG, metavar="|".join(ON_HANG),
        help="What is done then: replace the ranks that the others wait for, or stop. Default: replace.",
    )  # fmt: skip
    parser.add_argument(
        "--on-failure", choices=ON_FAILURE, metavar="|".join(ON_FAILURE),
        help="What is done when engines are lost: replace them, shrink to those that are left, or stop. Default: "
        "replace.",
    )  # fmt: skip
    parser.add_argument("-o", dest="output", metavar="NAME", help="Store the Run under this name too.")
    return parser


def _run_parser() -> OptionParser:
    parser = OptionParser(
        "%dist_run",
        "Show the run that goes on, or ask something of it, which all ranks do after the same step: stop (its weights "
        "come home), pause, resume, checkpoint [DIR], or lr RATE. Nothing is lost by any of them. What comes after the "
        "last step is not carried out, and the run's notes say so.",
    )
    parser.add_argument(
        "command", nargs="?", choices=ORDERS, metavar="|".join(ORDERS), help="What to do. Default: show the run."
    )
    parser.add_argument("value", nargs="?", metavar="DIR|RATE", help="Where the checkpoint goes, or the learning rate.")
    return parser


def _runs_parser() -> OptionParser:
    parser = OptionParser(
        "%dist_runs", "List the runs of which there is a record, the newest first, or show one. Needs no engines."
    )
    parser.add_argument("run_id", nargs="?", metavar="RUN_ID", help="Which to show; the beginning of its name will do.")
    parser.add_argument("-n", type=int, default=10, metavar="N", help="How many to list. Default: 10.")
    return parser


def _help_parser() -> OptionParser:
    parser = OptionParser("%dist_help", "Show what there is, or all about one of the magics.")
    parser.add_argument("magic", nargs="?", metavar="MAGIC", help="Which, such as dist_train.")
    return parser


ORDERS = ("stop", "pause", "resume", "checkpoint", "lr")
ATTACH = _attach_parser()
CLUSTERS = _clusters_parser()
DEBUG = _debug_parser()
SCALE = _scale_parser()
START = _start_parser()
STATUS = _status_parser()
STOP = _stop_parser()
DIST = _dist_parser()
HELP = _help_parser()
PUSH = _push_parser()
PULL = _pull_parser()
RUN = _run_parser()
RUNS = _runs_parser()
TRAIN = _train_parser()
WHERE = _where_parser()

PARSERS: dict[str, OptionParser] = {
    parser.prog: parser
    for parser in (START, TRAIN, RUN, RUNS, DIST, PUSH, PULL, STATUS, SCALE, WHERE, DEBUG, ATTACH, CLUSTERS, STOP, HELP)
} | {"%%dist_train": TRAIN}
"""By the word that begins the line, in the order in which a user meets them."""


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
