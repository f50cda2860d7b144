"""Another user of this host, a real second uid: what that process tries at the ranks' sockets, memory and store."""

from __future__ import annotations

import contextlib
import os
import pickle
import pwd
import resource
import socket
import sys
import threading
import types

import pytest
from other_user import as_other_user, needs_another_user

from nbdist import peer_auth
from nbdist.core.comm.guarded_store import GuardedStore, host_store
from nbdist.core.comm.p2p import pack_note, unpack_note
from nbdist.core.comm.rendezvous import GenerationStore
from nbdist.core.comm.shared_memory import connect
from nbdist.core.control.command_log import CommandLog
from nbdist.core.transfer.payload import Segment
from nbdist.telemetry.sinks import JsonlSink

pytestmark = needs_another_user


def ask_unproved(name):
    """Put a question to the store as a client of old did, without a proof."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(name)
        with contextlib.suppress(OSError):
            peer.sendall(peer_auth.pack([b"set", b"orders/run/0", b'["stop", null]']))
            return peer.recv(1).decode()
    return ""


def ask_proved(name, secret):
    peer_auth.same_user = lambda peer: True  # in this fork: an intruder does not ask who listens
    GuardedStore(name, secret).set("orders/run/0", '["stop", null]')


@pytest.mark.parametrize("ask", [ask_unproved, ask_proved])
def test_the_store_gives_and_takes_nothing(ask):
    """Neither without the world's secret nor, were it known, with it: no order comes to be."""
    store = host_store()
    told = as_other_user(ask, *store.address[: 1 if ask is ask_unproved else 2])
    assert told in ("", "ConnectionError", "ConnectionResetError", "BrokenPipeError")
    assert [] == CommandLog(store, "run").new()
    assert not store.check(["orders/run/0"])


def test_this_user_without_the_secret_is_refused_too():
    """So a process of another cluster does not take part by mistake."""
    store = host_store()
    with pytest.raises(OSError, match="secret"):
        GuardedStore(store.address[0], "00" * 32)


def test_a_store_on_loopback_asks_for_the_secret(monkeypatch):
    """As where sockets have no users: who knows the secret reads and writes, who does not is refused."""
    elsewhere = types.SimpleNamespace(platform="darwin", executable=sys.executable)
    monkeypatch.setattr("nbdist.core.comm.guarded_store.sys", elsewhere)
    store = host_store()
    assert store.address[0].startswith("127.0.0.1:")
    GuardedStore(*store.address).set("key", "value")
    assert b"value" == store.get("key")
    with pytest.raises(OSError, match="secret"):
        GuardedStore(store.address[0], "00" * 32)


def strangers(stack, store, count):
    """Connections to a store that prove nothing and stay."""
    peers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
    for peer in peers:
        peer.connect(store.address[0])
    return peers


def test_connections_that_prove_nothing_keep_nobody_out():
    """However many there are: the oldest are hung up on, and who has proved to belong to the world stays."""
    store = host_store()
    resource.prlimit(store.server_pid, resource.RLIMIT_NOFILE, (300, 300))
    with contextlib.ExitStack() as stack:
        peers = strangers(stack, store, 400)
        assert b"" == peers[0].recv(1)
        GuardedStore(*store.address).set("key", "value")
    assert b"value" == store.get("key")


def test_a_store_without_descriptors_lives_on():
    """It takes calls again when there are some."""
    store = host_store()
    resource.prlimit(store.server_pid, resource.RLIMIT_NOFILE, (16, 16))
    with contextlib.ExitStack() as stack:
        strangers(stack, store, 32)
        store.set("key", "value")
    assert b"value" == GuardedStore(*store.address).get("key")


def test_who_runs_a_process_is_its_effective_user(monkeypatch):
    """As the system tells of a peer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(os, "getuid", lambda: -1)
        assert peer_auth.same_user(theirs)


def call_at(name):
    """Call a rank in place of its peer, and wait until it hangs up."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(name)
        peer.sendall(bytes(20))
        return peer.recv(1).decode()


def test_a_rank_takes_no_call_of_another_user():
    """It hangs up, and goes on waiting for the real peer."""
    host = host_store()
    made = []
    stores = [GenerationStore(GuardedStore(*host.address), 1) for _ in range(2)]
    waiting = threading.Thread(target=lambda: made.extend(connect(0, 2, stores[0], "pair")))
    waiting.start()
    name = stores[1].get("pair/address/0").decode()
    assert as_other_user(call_at, name) in ("", "ConnectionResetError", "BrokenPipeError")
    (peer,) = connect(1, 2, stores[1], "pair")
    waiting.join()
    made[0].sendall(b"x")
    assert b"x" == peer.recv(1)
    for end in (peer, *made):
        end.close()


def test_a_rank_does_not_talk_to_a_squatter():
    """Who listens at the address of a rank, or of a store that has ended, must be this user."""
    name = f"\0nbdist-test-{os.getpid()}"
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(pwd.getpwnam("nobody").pw_uid)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen()
        os.write(ready[1], b"x")
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(peer_auth.IntruderError, match="another user"):
            GuardedStore(name, "00" * 32)
    finally:
        for end in (*ready, *done):
            os.close(end)
        os.waitpid(child, 0)


def open_path(path):
    with open(path, "rb"):
        return "opened"


def test_memory_cannot_be_opened_by_another_user():
    """It has no name but that of the descriptor of its process, which only this user may follow."""
    segment = Segment(4096)
    assert "PermissionError" == as_other_user(open_path, segment.path)
    segment.close()


def test_records_and_their_folders_are_private(tmp_path):
    """Also the folders that are made above the record."""
    os.chmod(tmp_path, 0o755)
    path = tmp_path / "home" / "runs" / "run" / "rank0.jsonl"
    JsonlSink(path).close()
    assert [0o700] * 3 == [folder.stat().st_mode & 0o777 for folder in list(path.parents)[:3]]
    assert 0o600 == path.stat().st_mode & 0o777


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_crafted_pickle_is_no_note(tmp_path):
    """Notes are plain data: bytes that would run code are refused, and run none."""
    with pytest.raises(ValueError, match=r"decode|JSON|Expecting"):
        unpack_note(pickle.dumps(Bomb(str(tmp_path / "told"))))
    assert not (tmp_path / "told").exists()


def test_a_note_keeps_its_types():
    """Tuples stay tuples, and a dict may have any string as a key."""
    note = (("forward", 1, 0), [True, None, 1.5], {"tuple": (1,), "dict": {}})
    assert note == unpack_note(pack_note(note))
