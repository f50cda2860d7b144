"""What we change in ipyparallel, and what we use of it that it does not document. Nothing else of nbdist does either.

Each function is a patch, with what happens without it: in another major version, or where its place has gone.
`tests/cluster/hosts/test_ipyparallel_patches.py` fails for a version that is not `VERIFIED`, or if a place changes.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import types
from pathlib import Path
from typing import Any

__all__ = ["CONTROL_PLANE", "VERIFIED", "adopt", "fork_nanny", "is_death", "skip_controller_sleep"]

VERIFIED = ("8.8.0", "9.2.0")
"""The oldest and the newest version that was read, and tested, for all of this."""
CONTROL_PLANE = ["ipyparallel.controller.app", "ipyparallel.engine.app", "ipyparallel.engine.nanny"]
"""Modules of its processes, for the fork server to load."""


def _has(place: object, *names: str) -> bool:
    """Whether the installed version is of a verified major one, and has these names."""
    import ipyparallel

    majors = {int(version.partition(".")[0]) for version in VERIFIED}
    return ipyparallel.version_info[0] in majors and all(hasattr(place, name) for name in names)


def skip_controller_sleep() -> bool:
    """Skip a sleep of 250 ms in the controller before it writes its connection files; returns whether that worked.

    Its sockets are bound by then, or queue messages. It is the only sleep in that module. Without it a start takes so
    much longer.
    """
    from ipyparallel.controller import app

    if not _has(app, "time"):
        return False
    app.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    return True


def fork_nanny() -> bool:
    """Fork the engine's nanny (ipyparallel's watchdog) now, while there is no thread; returns whether that worked.

    `start_nanny` is patched to use it. Without it ipyparallel starts a new Python, which takes longer to start than the
    engine: half a second.
    """
    from ipyparallel.engine import app, nanny

    if not (_has(app, "start_nanny") and _has(nanny, "main")):
        return False
    request_out, request_in = os.pipe()
    reply_out, reply_in = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.dup2(request_out, 0)
        os.dup2(reply_in, 1)
        os.closerange(3, max(request_out, request_in, reply_out, reply_in) + 1)
        Path("/proc/self/comm").write_text("nbdist-nanny")
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the server's own was at EOF
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        try:
            nanny.main()
        finally:
            os._exit(0)
    os.close(request_out)
    os.close(reply_in)

    def start_nanny(**arguments: Any) -> tuple[str, Any]:
        with open(request_in, "wb") as request:
            pickle.dump({**arguments, "pid": os.getpid()}, request)
        reply = open(reply_out)  # noqa: SIM115 - the nanny ends when it closes
        url = reply.readline().strip()
        if not url:
            raise RuntimeError("the nanny has ended")
        return url, reply

    app.start_nanny = start_nanny
    return True


def adopt(launcher: Any, pid: int) -> None:
    """Let a local launcher follow a process that it has not started itself, as `LocalProcessLauncher.from_dict` does.

    Where it has no `_start_waiting`, it does not learn by itself that the process has ended.
    """
    import psutil

    launcher.pid, launcher.process = pid, psutil.Process(pid)
    launcher.notify_start(pid)
    if _has(launcher, "_start_waiting"):
        launcher._start_waiting()


def is_death(error: Any) -> bool:
    """Whether the error of a call says that its engine has died. Without it, a dead rank is a failed one.

    That is an error of client or hub, so it names no engine; the class of a user's exception may have the same name.
    """
    return bool(error.ename == "EngineError" and not error.engine_info)
