"""A real kernel, driven as a front end does it."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import KernelManager
from shared_cluster import HUNG_S, folder_of, marked

GATE = f"import sys\nsys.path.append({str(Path(__file__).parents[1])!r})\nfrom gate import Gate"
"""A cell after which the kernel has the tests' gate, and so have its engines."""


@dataclass
class Cell:
    """The result of a cell: its reply, and its outputs as a saved notebook would hold them.

    An output that was updated also knows what it showed "before".
    """

    reply: dict[str, Any] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.reply["status"]

    @property
    def printed(self) -> str:
        return "".join(output["text"] for output in self.outputs if output["type"] == "stream")

    @property
    def rich(self) -> list[dict[str, Any]]:
        """MIME bundles, of displays and of the value."""
        return [output["data"] for output in self.outputs if "data" in output]


class Kernel:
    """Starts with the environment of this process, in the folder `cwd`."""

    def __init__(self, cwd: Any) -> None:
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(cwd))
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=HUNG_S)
        self.panels: list[str] = []

    def cluster(self) -> tuple[list[psutil.Process], Path]:
        """The processes of the cluster that the kernel has started, and their folder."""
        children = psutil.Process(self._manager.provisioner.pid).children(recursive=True)
        (folder,) = {folder for process in children if (folder := folder_of(process))}
        return [process for process in marked() if folder_of(process) == folder], folder

    def __call__(self, source: str) -> Cell:
        """Run a cell that must not fail."""
        cell = self.run(source)
        assert cell.status == "ok", cell.reply
        return cell

    def run(
        self,
        source: str,
        *,
        when: Callable[[Cell], Any] = lambda cell: False,
        then: Callable[[Cell], None] | None = None,
    ) -> Cell:
        """Run a cell; once its output meets a condition, call a function, by default ■."""
        sent = self._client.execute(source, stop_on_error=False)
        cell, shown, pending = Cell(), {}, True
        deadline = time.monotonic() + HUNG_S
        while True:
            assert time.monotonic() < deadline, f"the cell has not ended: {cell}"
            with contextlib.suppress(queue.Empty):
                message = self._client.get_iopub_msg(timeout=0.1)
                if message["msg_type"] == "comm_open" and "_anywidget_id" in message["content"]["data"]["state"]:
                    self.panels.append(message["content"]["comm_id"])  # in the background it may come after the cell
                if message["parent_header"].get("msg_id") == sent and self._take(message, cell, shown):
                    break
            if pending and when(cell):
                pending = False
                then(cell) if then else self._manager.interrupt_kernel()
        while True:
            message = self._client.get_shell_msg(timeout=HUNG_S)
            if message["parent_header"].get("msg_id") == sent:
                cell.reply = message["content"]
                return cell

    @staticmethod
    def _take(message: dict[str, Any], cell: Cell, shown: dict[str, dict[str, Any]]) -> bool:
        """Add a message to the outputs of its cell; return whether it was the last one."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            cell.outputs.append({"type": "stream", "text": content["text"]})
        elif kind in ("display_data", "execute_result"):
            cell.outputs.append({"type": kind, "data": content["data"], "before": []})
            if display_id := content.get("transient", {}).get("display_id"):
                shown[display_id] = cell.outputs[-1]
        elif kind == "update_display_data":
            output = shown[content["transient"]["display_id"]]
            output["before"].append(output["data"])
            output["data"] = content["data"]
        return kind == "status" and content["execution_state"] == "idle"

    def complete(self, text: str) -> dict[str, Any]:
        """The completions of Tab at the end of a cell."""
        return self._client.complete(text, reply=True, timeout=HUNG_S)["content"]

    def subshell(self) -> str | None:
        """A shell that answers while a cell is running, as JupyterLab asks for one; None where there is none."""
        message = self._client.session.msg("create_subshell_request")
        self._client.control_channel.send(message)
        return self._client.get_control_msg(timeout=HUNG_S)["content"].get("subshell_id")

    def press_stop(self, subshell: str | None = None) -> None:
        """Press the Stop button of the newest panel."""
        data = {"method": "custom", "content": {"command": "stop"}}
        message = self._client.session.msg("comm_msg", {"comm_id": self.panels[-1], "data": data})
        if subshell is not None:
            message["header"]["subshell_id"] = subshell
        self._client.shell_channel.send(message)

    def kill(self) -> None:
        """kill -9."""
        self._manager.shutdown_kernel(now=True)
        self._client.stop_channels()

    def shut_down(self) -> None:
        """As Jupyter does it when a user closes the notebook."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()
