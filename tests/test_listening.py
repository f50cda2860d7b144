"""The ports that nbdist listens on: any, or those of a range."""

from __future__ import annotations

import contextlib

import pytest

from nbdist.listening import PORTS_VARIABLE, listen_on, parse_ports, use_ports


@pytest.fixture
def free(monkeypatch):
    """Two ports beside each other that nobody has."""
    monkeypatch.setenv(PORTS_VARIABLE, "")
    while True:
        with contextlib.suppress(OSError), contextlib.closing(listen_on("127.0.0.1", 1)) as first:
            port = first.getsockname()[1]
            monkeypatch.setenv(PORTS_VARIABLE, f"{port + 1}-{port + 1}")
            listen_on("127.0.0.1", 1).close()
            return range(port, port + 2)


def test_a_range_is_used_up(free):
    """One after another; then the error names it."""
    use_ports(free)
    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(listen_on("127.0.0.1", 1)) for _ in free]
        assert [*free] == [listener.getsockname()[1] for listener in listeners]
        with pytest.raises(OSError, match=f"all ports of {free[0]}-{free[1]} are taken on this host: give more"):
            listen_on("127.0.0.1", 1)
    use_ports(range(0))
    with listen_on("127.0.0.1", 1) as listener:
        assert listener.getsockname()[1] not in free


@pytest.mark.parametrize("text", ["x", "10101", "10160-10101", "80-10101", "10101-70000"])
def test_what_is_no_range(text):
    with pytest.raises(ValueError, match=f"'{text}' is no range of ports: use FIRST-LAST, such as 10101-10160"):
        parse_ports(text)
