"""A real JupyterLab, a real Chromium, and a notebook that is open in it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
from playwright.sync_api import Browser, Locator, Page, expect
from shared_cluster import HUNG_S

SHOTS = Path(__file__).parents[2] / "shots"
WITHIN_MS = 1000 * HUNG_S
_QUIET = {"notification": {"fetchNews": "false", "checkForUpdates": False}}
_SETTLED = """() => {
    const reported = document.querySelector(".jp-Notebook-ExecutionIndicator");
    return !document.querySelector(".jp-Dialog") && (!reported || ["idle", "busy"].includes(reported.dataset.status));
}"""
_CHROMIUM = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def launch(playwright: Any, executable: str) -> Browser:
    """A headless Chromium that talks to this machine only."""
    return playwright.chromium.launch(executable_path=executable, args=_CHROMIUM, headless=True)


class Lab:
    """A Jupyter server with settings, records and notebooks of its own; ends with all its kernels.

    Args:
        root: An empty folder.
        settings: JupyterLab's settings, by plugin of its apputils extension.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.folder = root / "notebooks"
        self.folder.mkdir(parents=True)
        for name, value in {**_QUIET, **settings}.items():
            place = root / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.jupyterlab-settings").write_text(json.dumps(value))
        self._token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        names = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
                 "IPYTHONDIR": "ipython", "NBDIST_HOME": "home"}  # fmt: skip
        self._log = (root / "log").open("wb")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={self._token}",
             f"--ServerApp.root_dir={self.folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            stdout=self._log, stderr=subprocess.STDOUT,
            env={**os.environ, **{name: str(root / folder) for name, folder in names.items()}},
        )  # fmt: skip
        deadline = time.monotonic() + HUNG_S
        while True:
            with contextlib.suppress(OSError):
                self._ask("/api/status")
                return
            assert self._server.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)

    def _ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"token {self._token}")
        with urllib.request.urlopen(request, timeout=HUNG_S) as answer:
            return json.loads(answer.read() or b"null")

    def listens(self) -> bool:
        """Whether a front end is connected to a kernel that has said what it does."""
        try:
            kernels = self._ask("/api/kernels")
        except urllib.error.HTTPError:  # the server stumbles over a kernel that comes or goes just now
            return False
        return any(kernel["connections"] and kernel["execution_state"] in ("idle", "busy") for kernel in kernels)

    def end_kernels(self) -> None:
        """End all kernels, and wait until their processes are gone.

        A kernel that was killed is restarted by the server: in the middle of that it answers 500 to the request to end
        it, and a process begins that was not there when the kernels were listed. Hence again until nothing is left.
        """
        server, deadline = psutil.Process(self._server.pid), time.monotonic() + HUNG_S
        while True:
            with contextlib.suppress(urllib.error.HTTPError):
                for kernel in self._ask("/api/kernels"):
                    self._ask(f"/api/kernels/{kernel['id']}", "DELETE")
                if not self._ask("/api/kernels") and not server.children(recursive=True):
                    return
            assert time.monotonic() < deadline, f"kernels stay: {server.children(recursive=True)}"
            time.sleep(0.05)

    def close(self) -> None:
        """End the server."""
        with contextlib.suppress(OSError, urllib.error.URLError):
            self.end_kernels()
        self._server.terminate()
        self._server.wait(HUNG_S)
        self._log.close()

    def write(self, name: str, *cells: str) -> None:
        """Write a notebook of code cells."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.folder / name)

    def address(self, name: str, interface: str = "lab") -> str:
        """Where a notebook is opened, in JupyterLab ("lab") or Notebook ("notebook")."""
        place = (
            f"lab/workspaces/{secrets.token_hex(4)}/tree/{name}?reset&" if interface == "lab" else f"notebooks/{name}?"
        )
        return f"{self.url}/{place}token={self._token}"


class Sheet:
    """A notebook that is open in a browser."""

    def __init__(self, page: Page, lab: Lab, name: str, interface: str = "lab") -> None:
        self.page, self.lab, self.name = page, lab, name
        self.sent_s: list[float] = []
        page.on("websocket", lambda socket: socket.on("framereceived", self._note))
        page.goto(lab.address(name, interface), wait_until="domcontentloaded")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait for the notebook and an idle kernel; a question which kernel to take is answered."""
        page = self.page
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.add_locator_handler(
            page.locator(".jp-Dialog button.jp-mod-accept").first, lambda button: button.click(), no_wait_after=True
        )
        deadline = time.monotonic() + HUNG_S
        while not self.lab.listens():
            assert time.monotonic() < deadline, "the kernel is not ready"
            page.wait_for_timeout(50)
        page.wait_for_function(_SETTLED)
        page.locator(".jp-Notebook .jp-Cell .cm-content").first.wait_for()

    def _note(self, frame: str | bytes) -> None:
        """When the kernel sent what it says to a widget: the first date in a message is that of its own header."""
        text = frame if isinstance(frame, str) else frame.decode("utf-8", "replace")
        if "comm_msg" in text:
            date = re.search(r'"date": ?"([^"]+)"', text)[1]
            self.sent_s.append(datetime.datetime.fromisoformat(date.replace("Z", "+00:00")).timestamp())

    @property
    def panel(self) -> Locator:
        """The live panel."""
        return self.page.locator(".nbdist-panel").first

    @property
    def static(self) -> Locator:
        """What remains of a run."""
        return self.page.locator("div.nbdist").first

    def button(self, name: str) -> Locator:
        """A control of the panel, by its accessible name."""
        return self.panel.get_by_role("button", name=name, exact=True)

    def run_all(self) -> None:
        """Run all cells."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()

    def expect_state(self, state: str) -> None:
        """Wait until the run is in a state."""
        expect(self.panel).to_have_attribute("data-state", state)

    def expect_busy(self) -> None:
        """The cell still runs."""
        expect(self.page.locator(".jp-Notebook .jp-InputPrompt", has_text="[*]").first).to_be_visible()

    def step(self) -> int:
        """How many steps the panel says are done."""
        return int(self.panel.locator("dd").first.inner_text().split()[0].replace(",", ""))

    def expect_step_after(self, step: int) -> None:
        """Wait until more steps are done."""
        self.page.wait_for_function(
            "step => { const reported = document.querySelector('.nbdist-panel dd');"
            " return reported && parseInt(reported.textContent.replace(/,/g, '')) > step; }",
            arg=step,
        )  # fmt: skip

    def save(self) -> None:
        """Save the notebook, which has changed, and wait until it lies on the disk."""
        path = self.lab.folder / self.name
        before = path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + HUNG_S
        while path.stat().st_mtime_ns == before or not _whole(path):
            assert time.monotonic() < deadline, "the notebook was not saved"
            self.page.wait_for_timeout(50)

    def shot(self, name: str) -> None:
        """Leave a picture of the whole window, and one of the panel."""
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")
        if self.panel.is_visible():
            self.panel.screenshot(path=SHOTS / f"{name}-panel.png")


def _whole(path: Path) -> bool:
    """Whether a file of JSON is there to its end; Jupyter empties a notebook before it writes it."""
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return True


@contextlib.contextmanager
def opened(
    browser: Browser, lab: Lab, name: str, *cells: str, interface: str = "lab", **options: Any
) -> Iterator[Sheet]:
    """A new notebook in a new window; afterwards neither it nor its kernel is left."""
    lab.write(name, *cells)
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    context.set_default_timeout(WITHIN_MS)
    try:
        yield Sheet(context.new_page(), lab, name, interface)
    finally:
        context.close()
        lab.end_kernels()
