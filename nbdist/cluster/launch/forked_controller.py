"""The controller, as a fork of the fork server: it need not import ipyparallel anew."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ipyparallel.cluster import launcher
from traitlets import Bool

from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.ipyparallel_patches import adopt
from nbdist.cluster.hosts.local_host import GUARD

__all__ = ["ForkedController"]

_POLL_S = 0.01


class ForkedController(launcher.LocalControllerLauncher):
    """Starts the controller as a fork of the fork server, where there is one; else as ipyparallel's launcher does."""

    entrypoint_name = f"{__name__}.ForkedController"  # by which a `Cluster` that is saved as a dict finds this class

    engines_follow = Bool(True, config=True, help="Whether engines are started on this host too.")

    def start(self) -> None:
        """See ipyparallel."""
        pid = fork_client.try_fork(
            "controller", self.args[len(GUARD) + 1 :], {**os.environ, **self.get_env()}, os.path.abspath(self.work_dir),
            self.output_file, loads=self.engines_follow,
        )  # fmt: skip
        if pid is None:
            super().start()
        else:
            adopt(self, pid)

    async def get_connection_info(self, timeout: float | None = None) -> Any:
        """The contents of its connection files, once it has written them."""
        while self.process.is_running() and not all(os.path.exists(file) for file in self.connection_files.values()):
            await asyncio.sleep(_POLL_S)  # ipyparallel polls only ten times a second
        return await super().get_connection_info(timeout)
