"""A real IPython shell in this process."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config


@contextlib.contextmanager
def running_shell(folder: Any) -> Iterator[InteractiveShell]:
    """A shell that is ``get_ipython()`` and whose namespace is ``__main__``, for as long as the block runs."""
    main = sys.modules["__main__"]
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config, ipython_dir=str(folder))
    try:
        yield shell
    finally:
        InteractiveShell.clear_instance()
        atexit.unregister(shell.atexit_operations)  # they collect garbage, a third of a second for each shell
        sys.modules["__main__"] = main
