"""Authentication: a process of another user (a real second uid) tries the ranks' sockets, memory and store."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import socket
import sys
import threading
import types

import pytest
from other_user import all_received, as_other_user, in_fork, needs_another_user, other_user_listens

from nbdist import peer_auth
from nbdist.core.comm import peer_sockets
from nbdist.core.comm.authenticated_store import GuardedStore, host_store
from nbdist.core.comm.p2p import pack_note, unpack_note
from nbdist.core.comm.p2p_shared_memory import _FRAME, _NUMBER, SharedMemoryLink
from nbdist.core.comm.peer_sockets import connect
from nbdist.core.comm.rendezvous import GenerationStore
from nbdist.core.comm.shared_memory import receive_file
from nbdist.core.control.command_log import CommandLog
from nbdist.core.transfer.payload import Segment
from nbdist.errors import PeerLostError
from nbdist.telemetry.sinks import JsonlSink

pytestmark = needs_another_user


def set_unauthenticated(name):
    """Send a request to the store without authentication."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(name)
        with contextlib.suppress(OSError):
            peer.sendall(peer_auth.pack([b"set", b"commands/run/0", b'["stop", null]']))
            return peer.recv(1).decode()
    return ""


def set_with_secret(name, secret):
    peer_auth.same_user = lambda peer: True  # in this fork: an intruder skips its own check of the listener
    GuardedStore(name, secret).set("commands/run/0", '["stop", null]')


@pytest.mark.parametrize("attack", [set_unauthenticated, set_with_secret])
def test_the_store_gives_and_takes_nothing(attack):
    """Another user cannot write a command into the store, neither without the world's secret nor with it."""
    store = host_store()
    outcome = as_other_user(attack, *store.address[: 1 if attack is set_unauthenticated else 2])
    assert outcome in ("", "ConnectionError", "ConnectionResetError", "BrokenPipeError")
    assert [] == CommandLog(store, "run").new()
    assert not store.check(["commands/run/0"])


def test_this_user_without_the_secret_is_refused_too():
    """A process of another cluster cannot take part by mistake."""
    store = host_store()
    with pytest.raises(OSError, match="secret"):
        GuardedStore(store.address[0], "00" * 32)


def test_a_client_that_proves_nothing_is_not_answered():
    """Though it has this user's id, and knows the protocol: after a wrong proof the store closes the connection."""
    store = host_store()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(store.address[0])
        peer.sendall(peer_auth._HELLO.pack(0, bytes(16)))
        peer_auth.receive_exactly(peer, 16 + 32)
        peer.sendall(bytes(32) + peer_auth.pack([b"set", b"key", b"value"]))
        with contextlib.suppress(ConnectionResetError):  # since a part was not read
            assert b"" == peer.recv(1)
    assert not store.check(["key"])


def test_a_store_on_loopback_asks_for_the_secret(monkeypatch):
    """Over TCP, where a socket has no user: a client with the secret reads and writes, one without is refused."""
    elsewhere = types.SimpleNamespace(platform="darwin", executable=sys.executable)
    monkeypatch.setattr("nbdist.core.comm.authenticated_store.sys", elsewhere)
    store = host_store()
    assert store.address[0].startswith("127.0.0.1:")
    GuardedStore(*store.address).set("key", "value")
    assert b"value" == store.get("key")
    with pytest.raises(OSError, match="secret"):
        GuardedStore(store.address[0], "00" * 32)


def strangers(stack, store, count):
    """Connections to a store that do not authenticate, and stay open."""
    peers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
    for peer in peers:
        peer.connect(store.address[0])
    return peers


def test_connections_that_prove_nothing_keep_nobody_out():
    """However many there are: the store closes the oldest, and keeps authenticated clients."""
    store = host_store()
    resource.prlimit(store.server_pid, resource.RLIMIT_NOFILE, (300, 300))
    with contextlib.ExitStack() as stack:
        peers = strangers(stack, store, 400)
        assert b"" == peers[0].recv(1)
        GuardedStore(*store.address).set("key", "value")
    assert b"value" == store.get("key")


def test_a_store_without_descriptors_lives_on():
    """It accepts connections again when descriptors are free."""
    store = host_store()
    resource.prlimit(store.server_pid, resource.RLIMIT_NOFILE, (16, 16))
    with contextlib.ExitStack() as stack:
        strangers(stack, store, 32)
        store.set("key", "value")
    assert b"value" == GuardedStore(*store.address).get("key")


def test_who_runs_a_process_is_its_effective_user(monkeypatch):
    """SO_PEERCRED reports the effective user id of a peer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(os, "getuid", lambda: -1)
        assert peer_auth.same_user(theirs)


def connect_as_peer(name):
    """Connect to a rank in place of its peer, and wait until it closes the connection."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(name)
        peer.sendall(bytes(20))
        return peer.recv(1).decode()


def test_a_rank_takes_no_call_of_another_user():
    """It closes the connection, and waits on for the real peer."""
    host = host_store()
    made = []
    stores = [GenerationStore(GuardedStore(*host.address), 1) for _ in range(2)]
    waiting = threading.Thread(target=lambda: made.extend(connect(0, [1], stores[0], "pair")))
    waiting.start()
    name = stores[1].get("pair/address/0").decode()
    assert as_other_user(connect_as_peer, name) in ("", "ConnectionResetError", "BrokenPipeError")
    (peer,) = connect(1, [0], stores[1], "pair")
    waiting.join()
    made[0].sendall(b"x")
    assert b"x" == peer.recv(1)
    for end in (peer, *made):
        end.close()


def test_a_store_of_another_user_gets_nothing():
    """The process that listens at the address of a store must be this user's."""
    name = f"\0nbdist-test-{os.getpid()}"
    with other_user_listens(name, all_received) as received:
        with pytest.raises(peer_auth.IntruderError, match="another user"):
            GuardedStore(name, "00" * 32)
        assert "" == received()


def accept_without_secret(peer, _secret):
    peer_auth.receive_exactly(peer, peer_auth._HELLO.size)
    peer.sendall(bytes(16 + 32))
    return all_received(peer)


def accept_with_secret(peer, secret):
    peer_auth.same_user = lambda peer: True  # in this fork
    return peer_auth.authenticate_client(peer, bytes.fromhex(secret), "1/pair/0")


@pytest.mark.parametrize("answer", [accept_without_secret, accept_with_secret])
def test_a_rank_does_not_talk_to_a_rank_of_another_user(answer):
    """The process that listens at the address of a rank must be this user's, even if it knows the world's secret."""
    name, host = f"\0nbdist-test-{os.getpid()}", host_store()
    store = GenerationStore(host, 1)
    store.set("pair/address/0", name)
    with other_user_listens(name, answer, host.address[1]) as outcome:
        with pytest.raises(PeerLostError, match="another user's process listens"):
            connect(1, [0], store, "pair")
        assert outcome() in ("ConnectionError", "ConnectionResetError")


def given_a_name(address, path):
    """Send ranks the name of a file where a descriptor belongs: what they open of it."""
    opened, ended = [], []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(args[0]))  # for good, in this fork
    stores = [GenerationStore(GuardedStore(*address), 1) for _ in range(2)]
    linking = threading.Thread(target=lambda: ended.append(SharedMemoryLink(0, 1, stores[0], "pair", 2)))
    linking.start()
    (peer,) = connect(1, [0], stores[1], "pair")
    linking.join()
    link = ended.pop()
    ours, theirs = socket.socketpair()
    theirs.sendall(path.encode())
    with contextlib.suppress(PeerLostError), receive_file(ours):
        return "a file was received"
    peer.sendall(_FRAME.pack(b"M", _NUMBER.size) + _NUMBER.pack(1) + path.encode())
    with contextlib.suppress(PeerLostError):
        return link.receive()
    return [name for name in map(str, opened) if path in name]


def test_no_rank_opens_a_file_that_a_peer_names(tmp_path):
    """Memory comes as a descriptor, in a channel and in a link: bytes without one end the wait."""
    (tmp_path / "mine").write_text("mine")
    assert [] == in_fork(given_a_name, host_store().address, str(tmp_path / "mine"))


def open_path(path):
    with open(path, "rb"):
        return "opened"


def test_memory_cannot_be_opened_by_another_user():
    """Its only name is under /proc/<pid>/fd of its process, which only this user may open."""
    segment = Segment(4096)
    assert "PermissionError" == as_other_user(open_path, segment.path)
    segment.close()


def test_records_and_their_folders_are_private(tmp_path):
    """So are the folders that are made above the record."""
    os.chmod(tmp_path, 0o755)
    path = tmp_path / "home" / "runs" / "run" / "rank0.jsonl"
    JsonlSink(path).close()
    assert [0o700] * 3 == [folder.stat().st_mode & 0o777 for folder in list(path.parents)[:3]]
    assert 0o600 == path.stat().st_mode & 0o777


def test_a_rank_on_a_network_waits_on_for_its_peer(monkeypatch):
    """Over TCP, where a socket has no user: who proves nothing, wrong things or without the secret is not accepted."""
    monkeypatch.setattr(peer_sockets, "_PROOF_WITHIN_S", 0.05)
    host, made = host_store(), []
    stores = [GenerationStore(GuardedStore(*host.address), 1) for _ in range(2)]
    waiting = threading.Thread(target=lambda: made.extend(connect(0, [1], stores[0], "pair", "127.0.0.1")))
    waiting.start()
    address, _, port = stores[1].get("pair/address/0").decode().rpartition(":")
    for sent in (b"", bytes(20) + bytes(32)):
        with socket.create_connection((address, int(port))) as stranger:
            stranger.sendall(sent)
            answer = b"".join(iter(lambda stranger=stranger: stranger.recv(64), b""))
            assert len(answer) == (16 + 32 if sent else 0)
    socket.create_connection((address, int(port))).close()
    stores[1].secret = b"another"
    with pytest.raises(PeerLostError, match="without the world's secret"):
        connect(1, [0], stores[1], "pair")
    stores[1].secret = stores[0].secret
    (peer,) = connect(1, [0], stores[1], "pair", "127.0.0.1")
    waiting.join()
    made[0].sendall(b"x")
    assert b"x" == peer.recv(1)
    for end in (peer, *made):
        end.close()


class Bomb:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_crafted_pickle_is_no_note(tmp_path):
    """Notes are plain data: a pickle that would run code is refused, and nothing runs."""
    with pytest.raises(ValueError, match=r"decode|JSON|Expecting"):
        unpack_note(pickle.dumps(Bomb(str(tmp_path / "created"))))
    assert not (tmp_path / "created").exists()


def test_a_note_keeps_its_types():
    """Tuples stay tuples, and a dict may have any string as a key."""
    note = (("forward", 1, 0), [True, None, 1.5], {"tuple": (1,), "dict": {}})
    assert note == unpack_note(pack_note(note))
