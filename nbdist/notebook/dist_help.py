"""The help of ``%dist_help``: all magics on one screen, or all about one."""

from __future__ import annotations

from nbdist.errors import PlanError, suggest
from nbdist.notebook.parsers import PARSERS

__all__ = ["help_text", "help_text_of"]

_PHRASES = {
    "%dist_start": ("[-n N] [--hosts ...]", "start engines, one rank each"),
    "%dist_train": ("MODEL DATA [OPTIONS]", "train MODEL on all of them, in place"),
    "%%dist_train": ("MODEL DATA [OPTIONS]", "the same, the cell is one training step"),
    "%dist_predict": ("MODEL DATA", "return MODEL's outputs for DATA, in order"),
    "%dist_run": ("[stop|pause|resume|...]", "show the newest run, or send it a command"),
    "%dist_runs": ("[-n N] [RUN_ID]", "list past runs, or show one"),
    "%dist_compare": ("[RUNS]", "compare runs: options, best epochs, curves"),
    "%dist_export": ("FILE", "write the newest run as a script"),
    "%%dist": ("[--ranks 0,2-3] [--local]", "run the cell on engines"),
    "%dist_push": ("NAME ...", "send values to every engine"),
    "%dist_pull": ("NAME [--rank R]", "return a value of one engine"),
    "%dist_status": ("", "what engines do, and on which host"),
    "%dist_scale": ("N", "have N engines, also in the middle of a run"),
    "%dist_where": ("", "which line each rank is on, and why"),
    "%dist_debug": ("RANK", "pdb on the last error there"),
    "%dist_attach": ("[ID]", "take over a detached cluster"),
    "%dist_clusters": ("", "list detached clusters"),
    "%dist_stop": ("[--all]", "end the engines"),
    "%dist_help": ("[MAGIC]", "this, or all about one magic"),
}
_EXAMPLE = """\
  %dist_train model train_set --loss cross_entropy --epochs 5 --val test_set
■ stops after the step, a second ■ at once; --resume continues. Tab completes.
All options: %dist_help dist_train, or %dist_train? in any notebook."""


def help_text() -> str:
    """All magics, a line each, on one screen of 80 columns."""
    width = max(len(f"{name} {usage}") for name, (usage, _) in _PHRASES.items())
    lines = [f"  {f'{name} {usage}':<{width}}  {phrase}" for name, (usage, phrase) in _PHRASES.items()]
    return "\n".join(["Train on all processors, from this notebook:", *lines, "", _EXAMPLE])


def help_text_of(name: str) -> str:
    """All about one magic.

    Raises:
        PlanError: There is none of that name.
    """
    known = {magic.lstrip("%"): parser for magic, parser in PARSERS.items()}
    short = name.lstrip("%")
    for word in (short, f"dist_{short}"):
        if word in known:
            return known[word].format_help().rstrip()
    raise PlanError(f"there is no magic {name!r}: use {', '.join(known)}.{suggest(short, known)}")
