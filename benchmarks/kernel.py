"""A real notebook kernel to measure in."""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType
from typing import Any

import psutil
from jupyter_client.manager import KernelManager

__all__ = ["Kernel"]


class Kernel:
    """A kernel with nbdist loaded; a context manager.

    Attributes:
        loading_s: How many seconds ``%load_ext nbdist`` took.
    """

    def __enter__(self) -> Kernel:
        self._manager = KernelManager(kernel_name="python3")
        # Each process would compile the package anew, 0.2 s; an installed one, as torch on the other side, is compiled.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._manager.start_kernel(stderr=subprocess.DEVNULL, env=environment)  # it warns of what is not ours
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self.process = psutil.Process(self._manager.provisioner.pid)
        self.run("import time")
        self.loading_s = self.seconds("%load_ext nbdist")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.execute_interactive("%dist_stop --all", output_hook=lambda message: None)
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def run(self, source: str) -> str:
        """Run a cell and return what it printed; one that fails ends the benchmark."""
        printed: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

        reply = self._client.execute_interactive(source, timeout=300, output_hook=collect)["content"]
        if reply["status"] != "ok":
            sys.exit("\n".join(reply["traceback"]))
        return "".join(printed)

    def seconds(self, source: str) -> float:
        """How long the lines of a cell take, as the kernel sees it."""
        source = f"_started_s = time.perf_counter()\n{source}\nprint('took', time.perf_counter() - _started_s)"
        return float(self.run(source).split("took ")[-1])

    def family(self) -> list[psutil.Process]:
        """The kernel's processes beside itself: fork server, controller, engines, nannies."""
        return self.process.children(recursive=True)
