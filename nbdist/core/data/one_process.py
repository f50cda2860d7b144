"""As one process: rank 0 reads as if there were no other ranks, so a stream that takes its part by rank gives all."""

from __future__ import annotations

import os
from typing import Any

from nbdist.upstream.torch_private import GroupHidden

__all__ = ["AsOneProcess"]

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class AsOneProcess:
    """Context in which this process, and those that it starts, see a world of one rank. Local, for the main thread.

    That is what the environment says, and `torch.distributed`, which then has no group.
    """

    def __enter__(self) -> None:
        """Hide the other ranks."""
        self._before = {name: os.environ[name] for name in _ALONE if name in os.environ}
        os.environ.update({name: _ALONE[name] for name in self._before})
        self._hidden = GroupHidden()
        self._hidden.__enter__()

    def __exit__(self, *_: Any) -> None:
        """Show them again."""
        self._hidden.__exit__()
        os.environ.update(self._before)
