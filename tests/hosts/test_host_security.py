"""What goes over a network: encrypted or proven, listened to on the chosen address only, and refused to others."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
import zmq

import nbdist
from nbdist.cluster.hosts import waiting_hosts

ALL_PROTOCOLS = 3  # ETH_P_ALL
MARKER = "a-secret-that-no-wire-may-carry"


@pytest.fixture
def cluster(network):
    """An engine on each of two hosts."""
    with nbdist.Cluster(hosts={"h1": 1, "h2": 1}, device="cpu", spares=0) as started:
        yield started


@contextlib.contextmanager
def sniffer() -> Iterator[bytearray]:
    """What goes over this host's network meanwhile: the bytes are there when the context ends."""
    seen, ended = bytearray(), threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS)) as wire:
        wire.bind(("eth0", 0))
        wire.settimeout(0.1)

        def listen() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    seen.extend(wire.recv(1 << 17))

        thread = threading.Thread(target=listen)
        thread.start()
        yield seen
        ended.set()
        thread.join()


def listening(text: str) -> set[str]:
    """The addresses of ``ss -ltnH`` that are no loopback and not ssh's."""
    local = {line.split()[3] for line in text.splitlines() if line.strip()}
    return {address.rpartition(":")[0] for address in local if not address.endswith(":22")} - {"127.0.0.1", "[::1]"}


def test_nothing_listens_on_all_addresses(cluster, network):
    for host, address in (("head", "10.77.0.1"), ("h1", "10.77.0.11"), ("h2", "10.77.0.12")):
        assert listening(network.run(host, "ss -ltnH")) <= {address}


def test_a_sniffer_sees_no_marker(cluster, network):
    """Neither what is pushed, nor cells, nor what they print."""
    with sniffer() as seen:
        cluster.push(secret=MARKER)
        cluster.execute(f"print(secret, '{MARKER}')").wait()
        assert cluster.pull("secret", rank=1) == MARKER
    assert len(seen) > 10 * len(MARKER)
    assert MARKER.encode() not in seen


def test_messages_are_signed_too(cluster):
    assert len(cluster._up._launch.client._client.session.key) >= 32


def test_an_agent_without_the_invitation_is_not_served(cluster):
    """A peer that knows the address, with keys of its own or none."""
    address, public = (getattr(next(iter(waiting_hosts._agents.values())), name) for name in ("_address", "_public"))
    with zmq.Context() as context:
        for keys in (None, zmq.curve_keypair()):
            with context.socket(zmq.DEALER) as intruder:
                intruder.setsockopt(zmq.LINGER, 0)
                intruder.setsockopt(zmq.IDENTITY, b"h1")
                if keys is not None:
                    intruder.curve_serverkey, (intruder.curve_publickey, intruder.curve_secretkey) = public, keys
                monitor = intruder.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED)
                intruder.connect(address)
                intruder.send_multipart([b"", b'["ended", "1:1"]'])
                assert monitor.poll(30_000)
    assert {engine.state for engine in cluster.engines} == {"idle"}


def test_a_forged_message_does_nothing(cluster, network):
    """To the store and the controller, from another host and another user: neither is answered, and the ranks go on."""
    store, port = cluster._up._store.address[0].split(":")
    controllers = cluster._up._launch._ports.numbers
    code = f"""
import json, os, socket, struct, zmq
os.setuid(65534)
def answer(address, data):
    with socket.create_connection(address, 5) as peer:
        peer.settimeout(5)
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        try:
            return len(peer.recv(64)) + len(peer.recv(64))
        except OSError:
            return 0
field = lambda data: struct.pack("!I", len(data)) + data
body = b"".join(map(field, [b"set", b"commands/x/0", b"stop"]))
print("store", answer(("{store}", {port}), field(body)))
context, replies = zmq.Context(), 0
for port in {controllers}:
    peer = context.socket(zmq.DEALER)
    peer.linger = 0
    peer.connect("tcp://{store}:%d" % port)
    request = b'{{"msg_type": "connection_request"}}'
    peer.send_multipart([b"<IDS|MSG>", b"signature", request, b"{{}}", b"{{}}", b"{{}}"])
    replies += peer.poll(100)
print("controller", replies)
"""
    shown = network.run("h2", f"cat > /tmp/forged.py <<'END'\n{code}\nEND\n{sys.executable} /tmp/forged.py")
    assert shown.split() == ["store", "48", "controller", "0"], shown  # its challenge, and nothing after it
    assert not cluster._up._store.check(["commands/x/0"])
    assert [cluster.pull("rank", rank) for rank in range(2)] == [0, 1]
