"""What a user types and sees: magics, panel, tables. Uses IPython and anywidget; never imports torch."""

from __future__ import annotations

from typing import Any

__all__ = ["load", "unload"]


def load(shell: Any) -> None:
    """Register the magics and how a Run is shown."""
    from nbdist.cluster import Run, watched_modules
    from nbdist.notebook import completion
    from nbdist.notebook.magics import DistMagics

    watched_modules()
    magics = DistMagics(shell)
    shell.register_magics(magics)
    completion.install(shell)
    shell.display_formatter.ipython_display_formatter.for_type(Run, magics.show_run)


def unload(shell: Any) -> None:
    """Stop the engines, if any are running."""
    from nbdist.cluster import current_cluster
    from nbdist.notebook import completion

    completion.remove(shell)
    cluster = current_cluster()
    if cluster is not None:
        cluster.stop()
