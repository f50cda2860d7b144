"""The status board: the newest state of a rank, read by polling."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from nbdist.core.transfer.payload import Segment
from nbdist.engine.status_board import BOARD_BYTES, Board, BoardReader, MappedReader


@pytest.fixture
def pair():
    with contextlib.closing(Segment(BOARD_BYTES)) as segment:
        yield Board(segment.path), MappedReader(segment.path)


def test_the_newest_is_read_once(pair):
    """Nothing at first; then what was written last, whatever its length, and nothing again."""
    writer, reader = pair
    assert [] == reader.read()
    for data in (b"one", b"", b"a longer word", b"x"):
        writer.write(b"missed")
        assert writer.write(data)
        assert [data] == reader.read()
        assert [] == reader.read()


def test_frequent_data_does_not_overwrite_rare_data(pair):
    """Both are read, in the order in which they were written."""
    writer, reader = pair
    writer.write(b"large", seldom=True)
    writer.write(b"small")
    assert [b"large", b"small"] == reader.read()
    writer.write(b"small again")
    writer.write(b"large again", seldom=True)
    assert [b"small again", b"large again"] == reader.read()


@pytest.mark.parametrize("seldom", [False, True])
def test_what_does_not_fit_changes_nothing(pair, seldom):
    """The earlier data stays."""
    writer, reader = pair
    writer.write(b"kept", seldom=seldom)
    assert not writer.write(bytes(BOARD_BYTES), seldom=seldom)
    assert [b"kept"] == reader.read()


def test_a_reader_by_messages_asks_again_for_what_is_longer(pair):
    """Small data waits for the large ones that were written before it, so states never go back."""
    board, _ = pair
    board.write(b"L" * 5000, seldom=True)
    board.write(b"small")
    reader = BoardReader()

    def look():
        return reader.new([board._memory[start : start + length] for start, length in reader.places])

    lengths = [length for _, length in reader.places]
    assert [] == look()
    assert [b"L" * 5000, b"small"] == look()
    assert [] == look()
    assert lengths == [length for _, length in reader.places]
    assert [] == reader.new([b"", b""])


WRITER = """
import itertools, sys
from nbdist.engine.status_board import Board
board = Board(sys.argv[1])
for i in itertools.count():
    board.write(bytes([i % 251]) * (i % 4000 + 1))
"""


def test_nothing_is_read_half_written():
    """While another process writes as fast as it can, everything read is something that was written."""
    with contextlib.closing(Segment(BOARD_BYTES)) as segment:
        reader = MappedReader(segment.path)
        with subprocess.Popen([sys.executable, "-c", WRITER, segment.path]) as writer:
            words = []
            while len(words) < 200:
                assert writer.poll() is None
                words += reader.read()
            writer.kill()
    assert all(1 == len(set(word)) for word in words)
