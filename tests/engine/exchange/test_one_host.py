"""States on one host: what is large is kept until it has been read, however often small states follow."""

from __future__ import annotations

import contextlib
import dataclasses

from nbdist.engine.exchange.one_host import OneHost
from nbdist.telemetry import Point, Progress, RankState

CURVES = {"loss": (Point(1, 1, 2.0, 2.0, 2.0),), "kl": (Point(1, 1, 0.5, 0.5, 0.5),)}
FIRST = Progress(rank=0, step=1, epoch=1, samples=4, loss=2.0, samples_per_s=1.0, memory_mib=1.0, curves=CURVES)


def test_curves_outlive_the_small_states_after_them():
    """The first state is a whole one; small ones follow before the notebook reads: both are read, in that order."""
    with contextlib.closing(OneHost().state_reader(1, None)) as reader:
        sink = reader.publisher.sink(0)
        for step in range(1, 6):
            sink.emit(dataclasses.replace(FIRST, step=step, curves=CURVES if step == 1 else {}))
        whole, *small = reader.read(0, lambda: None)
        state = RankState.from_dict(whole)
        for one in small:
            assert not RankState.is_whole(one)
            state = RankState.from_dict(one, state)
        assert CURVES == state.curves
