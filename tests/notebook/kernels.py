"""A real kernel, driven as a front end does it."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import KernelManager

_WITHIN_S = 60.0


@dataclass
class Cell:
    """What a cell left behind: its reply, and its outputs as a saved notebook would hold them."""

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
        self._client.wait_for_ready(timeout=_WITHIN_S)

    @property
    def pid(self) -> int:
        return self._manager.provisioner.pid

    def __call__(self, source: str) -> Cell:
        """Run a cell that must not fail."""
        cell = self.run(source)
        assert cell.status == "ok", cell.reply
        return cell

    def run(self, source: str, *, interrupt_after: Callable[[Cell], bool] = lambda cell: False) -> Cell:
        """Run a cell, and press ■ once what it has shown so far says that it is time."""
        sent = self._client.execute(source, stop_on_error=False)
        cell, shown, interrupted = Cell(), {}, False
        deadline = time.monotonic() + _WITHIN_S
        while True:
            assert time.monotonic() < deadline, f"the cell has not ended: {cell}"
            with contextlib.suppress(queue.Empty):
                message = self._client.get_iopub_msg(timeout=0.1)
                if message["parent_header"].get("msg_id") == sent and self._take(message, cell, shown):
                    break
            if not interrupted and interrupt_after(cell):
                interrupted = True
                self._manager.interrupt_kernel()
        while True:
            message = self._client.get_shell_msg(timeout=_WITHIN_S)
            if message["parent_header"].get("msg_id") == sent:
                cell.reply = message["content"]
                return cell

    @staticmethod
    def _take(message: dict[str, Any], cell: Cell, shown: dict[str, dict[str, Any]]) -> bool:
        """Add a message to the outputs of its cell; tell whether it was the last one."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            cell.outputs.append({"type": "stream", "text": content["text"]})
        elif kind in ("display_data", "execute_result"):
            cell.outputs.append({"type": kind, "data": content["data"]})
            if display_id := content.get("transient", {}).get("display_id"):
                shown[display_id] = cell.outputs[-1]
        elif kind == "update_display_data":
            shown[content["transient"]["display_id"]]["data"] = content["data"]
        return kind == "status" and content["execution_state"] == "idle"

    def kill(self) -> None:
        """kill -9."""
        self._manager.shutdown_kernel(now=True)
        self._client.stop_channels()

    def shut_down(self) -> None:
        """As Jupyter does it when a person closes the notebook."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()
