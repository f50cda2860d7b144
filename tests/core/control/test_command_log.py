"""The log of orders: what a notebook asks of a run, in the store of its ranks."""

from __future__ import annotations

import pytest

from nbdist.core.comm.rendezvous import reach_store
from nbdist.core.comm.world import host_store
from nbdist.core.control.command_log import CommandLog
from nbdist.core.control.commands import Command


@pytest.fixture(scope="module")
def store():
    return host_store()


@pytest.fixture
def run_id(request):
    """A run of this test alone."""
    return request.node.name


class Dying:
    """A store whose user dies after so many words to it: the next one is never said."""

    def __init__(self, store, words):
        self._store, self._words = store, words

    def __getattr__(self, name):
        if not self._words:
            raise EOFError("the writer has died")
        self._words -= 1
        return getattr(self._store, name)


def test_orders_are_heard_in_the_order_in_which_they_were_given(store, run_id):
    """From several writers, and each once."""
    here, there, agreed = CommandLog(store, run_id), CommandLog(store, run_id), CommandLog(store, run_id)
    here.give("lr", 0.5)
    there.give("checkpoint", "/tmp/a\nb")
    here.give("stop", None)
    assert [Command("lr", 0.5), Command("checkpoint", "/tmp/a\nb"), Command("stop")] == agreed.new()
    agreed._next_s = 0.0
    assert [] == agreed.new()


@pytest.mark.parametrize("words", [0, 1])
def test_a_writer_that_dies_leaves_no_hole(store, run_id, words):
    """Whenever it died, its order was given or was not, and those after it are heard."""
    dying = CommandLog(Dying(store, words), run_id)
    try:
        dying.give("pause", None)
    except EOFError:
        assert words == 0
    CommandLog(store, run_id).give("stop", None)
    expected = [Command("pause")] * words + [Command("stop")]
    assert expected == CommandLog(store, run_id).new()


def test_what_was_carried_out_is_known_from_the_log(store, run_id):
    """After which step; by a rank that reads it anew."""
    log = CommandLog(store, run_id)
    for kind in ("pause", "resume", "stop"):
        log.give(kind, None)
    log.stamp(1, 7)
    assert [None, 7, None] == [command.step for command in CommandLog(store, run_id).new()]


def test_another_process_reaches_the_same_log(store, run_id):
    """Through a connection of its own, as rank 0 does."""
    CommandLog(store, run_id).give("pause", None)
    other = reach_store(*store.address)
    assert [Command("pause")] == CommandLog(other, run_id).new()
    assert [] == CommandLog(other, "another").new()
