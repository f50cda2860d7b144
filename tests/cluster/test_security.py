"""No other user can reach the engines: everything listens on loopback, and messages without the key are dropped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import zmq
from ipyparallel.serialize import pack_apply_message
from jupyter_client.session import Session
from other_user import all_received, as_other_user, needs_another_user, other_user_listens, reachable
from shared_cluster import ENGINES, folder_of, marked, until
from tasks import classes, net

from nbdist.cluster import current_server
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.engine import debug_server
from nbdist.errors import ClusterError, EngineError

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def of_cluster(cluster):
    folder = folder_of(psutil.Process(cluster.engines[0].pid))
    return [process for process in marked() if folder_of(process) == folder]


def listening(process):
    return {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}


@pytest.fixture
def security_folder(cluster):
    """Where ipyparallel keeps the keys of the running cluster."""
    return folder_of(psutil.Process(cluster.engines[0].pid)) / "profile" / "security"


@pytest.fixture
def connection(security_folder):
    """The connection file of a client of the running cluster."""
    return json.loads((security_folder / "ipcontroller-client.json").read_text())


def test_everything_listens_on_loopback(cluster):
    """Controller, engines, spare, nannies and this process, which hosts the store; gloo's sockets too, in a world."""
    cluster.train(net(), classes(), loss="cross_entropy")
    until(lambda: cluster.spare_engines)
    found = {process: listening(process) for process in [psutil.Process(), *of_cluster(cluster)]}
    assert len(found) >= 2 + 2 * (ENGINES + cluster.spares)
    assert all(found[psutil.Process(engine.pid)] for engine in cluster.engines)
    assert {address.ip for addresses in found.values() for address in addresses} <= LOOPBACK


def test_keys_are_for_their_owner_only(security_folder):
    """The files are 0600, and the folder is 0700."""
    files = [path for path in security_folder.iterdir() if path.is_file()]
    assert len(files) >= 2
    assert {0o600} == {stat.S_IMODE(path.stat().st_mode) for path in files}
    assert 0o700 == stat.S_IMODE(security_folder.stat().st_mode)


def test_a_message_with_another_key_runs_nothing(cluster, connection, tmp_path):
    """Sent to every engine through each of the controller's ports; the cluster keeps working."""
    marker = tmp_path / "marker"
    forger = Session(key=b"another key", username="another process")
    call = pack_apply_message(marker.write_text, ("forged",), {})
    engines = cluster._up._launch.client._client._engines
    controllers = [process for process in of_cluster(cluster) if "controll" in process.name()]
    ports = {address.port for process in controllers for address in listening(process)}
    assert len(ports) >= 6
    context = zmq.Context()
    for port in ports:
        with context.socket(zmq.DEALER) as dealer:
            dealer.linger = dealer.sndtimeo = 1000
            dealer.connect(f"tcp://127.0.0.1:{port}")
            with contextlib.suppress(zmq.Again):  # a port of publishers closes on a dealer
                for engine in [None, *engines.values()]:
                    ident = None if engine is None else engine.encode()
                    forger.send(dealer, "apply_request", ident=ident, content={}, buffers=call, metadata={})
                    forger.send(dealer, "execute_request", ident=ident, content={"code": f"open({str(marker)!r}, 'w')"})
    context.term()  # all has been sent
    for _ in range(3):
        cell = cluster.execute("print(rank)")
        cell.wait()
        assert {0: "0\n", 1: "1\n"} == cell.printed()
    assert not marker.exists()
    assert connection["key"] != "another key"


def test_the_same_message_with_the_right_key_would_run(cluster, connection, tmp_path):
    """So the key is what rejects a forged message."""
    marker = tmp_path / "marker"
    caller = Session(key=connection["key"].encode(), signature_scheme=connection["signature_scheme"])
    engine = cluster._up._launch.client._client._engines[cluster._up._ids[0]]
    context = zmq.Context()
    with context.socket(zmq.DEALER) as dealer:
        dealer.linger = 1000
        dealer.connect(f"tcp://127.0.0.1:{connection['mux']}")
        caller.send(dealer, "execute_request", ident=engine.encode(), content={"code": f"open({str(marker)!r}, 'w')"})
        until(marker.exists)
    context.term()


def read(path):
    return os.listdir(path) if os.path.isdir(path) else open(path, "rb").read().hex()


@needs_another_user
def test_another_user_reads_nothing_of_a_cluster(cluster, security_folder):
    """No key, no log and no name of a file; nor the memory and sockets of its processes and of the fork server."""
    folder = folder_of(psutil.Process(cluster.engines[0].pid))
    processes = [psutil.Process().pid, current_server().pid, *(process.pid for process in of_cluster(cluster))]
    tried = [
        folder,
        *folder.rglob("*"),
        *(f"/proc/{pid}/{held}" for pid in processes for held in ("fd", "mem", "environ")),
    ]
    assert len(tried) >= 20
    with reachable(folder):
        assert {str(path): "PermissionError" for path in tried} == {
            str(path): as_other_user(read, str(path)) for path in tried
        }


@needs_another_user
def test_an_anchor_closes_the_connection_of_another_user(home, tmp_path):
    """Also where the mode of its folder would let that user in; the owner's connection stays."""
    folder = tmp_path / "cluster"
    folder.mkdir(mode=0o755)
    anchor = Anchor.start(str(folder), 60.0)
    try:
        (listener,) = [path for path in folder.iterdir() if path.is_socket()]
        listener.chmod(0o777)
        with reachable(listener):
            assert as_other_user(talk, str(listener)) in ("", "ConnectionResetError", "BrokenPipeError")
        anchor.note("name", 1)
        assert {"name": 1} == anchor.state()["notes"]
    finally:
        anchor.end()


def talk(path):
    """Send an owner's request, and return the reply."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        with Connection(peer.detach()) as connection:
            connection.send((1, "look"))
            try:
                return str(connection.recv())
            except EOFError:
                return ""


@pytest.fixture
def everyones(tmp_path):
    """A folder in which every user can listen."""
    folder = tmp_path / "everyone's"
    folder.mkdir()
    folder.chmod(0o777)
    with reachable(folder):
        yield folder


@needs_another_user
def test_a_kernel_says_nothing_to_an_anchor_of_another_user(everyones):
    """Which would answer in pickles: the cluster counts as ended."""
    with other_user_listens(str(everyones / "anchor"), all_received) as received:
        with pytest.raises(ClusterError, match="the anchor of cluster name has ended"):
            Anchor("name", str(everyones), "mark", 60.0)
        assert "" == received()


@needs_another_user
def test_an_engine_says_nothing_to_a_debugger_of_another_user(everyones):
    """Whose input would run on the engine."""
    with pytest.raises(ZeroDivisionError) as failed:
        _ = 1 / 0
    with other_user_listens(str(everyones / "debug"), all_received) as received:
        with pytest.raises(PermissionError, match="another user's process listens at"):
            debug_server.serve(str(everyones / "debug"), 0, "> ", failed.value)
        assert "" == received()


def ask_for_input(path, prompt):
    """Connect in place of an engine, and show a prompt."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(prompt.encode())
        return "connected"


@needs_another_user
def test_a_kernel_asks_for_no_input_for_another_user(cluster, monkeypatch):
    """Who connects before the engine does, even where the mode of the folder would let that user in."""
    with pytest.raises(EngineError):
        cluster.execute("1 / 0").wait()
    start_call, asked = Engines.start_call, []

    def intruded(self, rank, name, *args):
        if name == "debug":
            path, _, prompt = args
            os.chmod(path, 0o777)
            with reachable(Path(path)):
                assert "connected" == as_other_user(ask_for_input, path, prompt)
        return start_call(self, rank, name, *args)

    monkeypatch.setattr(Engines, "start_call", intruded)
    with pytest.raises(ClusterError, match="another user's process connected instead of an engine"):
        cluster.debug(1, lambda prompt: asked.append(prompt) or "q", asked.append)
    assert [] == asked
    assert 1 == cluster.pull("rank", 1)
