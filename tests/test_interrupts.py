"""Interrupts wait until a critical section has ended."""

from __future__ import annotations

import signal
import threading

import pytest

from nbdist import interrupts


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_one_that_is_delayed_is_raised_at_the_end():
    """Once, however many have come, and after an error of the section too, whose context it has."""
    done = []

    @interrupts.delayed()
    def section(error):
        interrupt()
        interrupt()
        done.append(error)
        if error is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        section(None)
    error = ZeroDivisionError()
    with pytest.raises(KeyboardInterrupt) as raised:
        section(error)
    assert raised.value.__context__ is error
    assert [None, error] == done


def test_without_one_nothing_is_raised():
    """And an error of the section is its own."""
    with interrupts.delayed():
        pass
    with pytest.raises(ZeroDivisionError), interrupts.delayed():
        raise ZeroDivisionError


def test_they_are_collected_or_ignored():
    """Then it is the caller who says what they mean, or they mean nothing."""
    with interrupts.collected() as came:
        interrupt()
    with interrupts.ignored():
        interrupt()
    assert [signal.SIGINT] == came


@pytest.mark.parametrize("section", [interrupts.collected, interrupts.delayed, interrupts.ignored])
def test_the_handler_from_before_is_back(section):
    """Also if it was not Python's."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with section():
            assert signal.getsignal(signal.SIGINT) is not handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_has_no_interrupts_to_wait():
    """Nothing is changed there, where Python allows no change."""
    found = []

    def work():
        with interrupts.collected() as came, interrupts.delayed(), interrupts.ignored():
            found.append(came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [[]] == found
