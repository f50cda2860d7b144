"""The command log: a notebook's commands to a run, in the store of its ranks."""

from __future__ import annotations

import pytest

from nbdist.core.comm.rendezvous import connect_store
from nbdist.core.comm.world import host_store
from nbdist.core.control.command_log import CommandLog
from nbdist.core.control.commands import Command


@pytest.fixture(scope="module")
def store():
    return host_store()


@pytest.fixture
def run_id(request):
    """A run id unique to the test."""
    return request.node.name


class Dying:
    """A store whose writer dies after so many calls."""

    def __init__(self, store, calls):
        self._store, self._calls = store, calls

    def __getattr__(self, name):
        if not self._calls:
            raise EOFError("the writer has died")
        self._calls -= 1
        return getattr(self._store, name)


def test_commands_are_read_in_the_sequence_in_which_they_were_appended(store, run_id):
    """From several writers, each once."""
    here, there, agreed = CommandLog(store, run_id), CommandLog(store, run_id), CommandLog(store, run_id)
    here.append("lr", 0.5)
    there.append("checkpoint", "/tmp/a\nb")
    here.append("stop", None)
    assert [Command("lr", 0.5), Command("checkpoint", "/tmp/a\nb"), Command("stop")] == agreed.new()
    agreed._next_s = 0.0
    assert [] == agreed.new()


@pytest.mark.parametrize("calls", [0, 1])
def test_a_writer_that_dies_leaves_no_hole(store, run_id, calls):
    """Its command was appended or not, and later commands are read."""
    dying = CommandLog(Dying(store, calls), run_id)
    try:
        dying.append("pause", None)
    except EOFError:
        assert calls == 0
    CommandLog(store, run_id).append("stop", None)
    expected = [Command("pause")] * calls + [Command("stop")]
    assert expected == CommandLog(store, run_id).new()


def test_applied_commands_are_stamped_in_the_log(store, run_id):
    """A new reader sees the step after which each was applied."""
    log = CommandLog(store, run_id)
    for kind in ("pause", "resume", "stop"):
        log.append(kind, None)
    log.stamp(1, 7)
    assert [None, 7, None] == [command.step for command in CommandLog(store, run_id).new()]


def test_another_process_reaches_the_same_log(store, run_id):
    """Through a connection of its own, as rank 0 does."""
    CommandLog(store, run_id).append("pause", None)
    other = connect_store(*store.address)
    assert [Command("pause")] == CommandLog(other, run_id).new()
    assert [] == CommandLog(other, "another").new()
