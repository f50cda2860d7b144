"""A run that ends early: on all ranks after the same epoch, and also after a resume or a recovery."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, alone, classes, losses, mlp, train

from nbdist.telemetry import ListSink, Noted

OPTIONS = {"optimizer": SGD, "batch_size": 8, "early_stop": "score:2", "epochs": 9}


class Scored:
    """Logs one score after another, the same in all steps of an epoch."""

    def __init__(self, scores, steps=2, slices=1):
        self.scores, self.calls, self.each = scores, 0, steps * slices

    def __call__(self, model, batch):
        x, y = batch
        score = self.scores[min(self.calls // self.each, len(self.scores) - 1)]
        self.calls += 1
        return torch.nn.functional.cross_entropy(model(x), y), {"score": score}


def scored(world):
    sink = ListSink()
    step = Scored([1.0, 5.0, 4.0, 3.0, 9.0])
    result, _ = train(world, mlp(), classes(16), step=step, sinks=[sink], check="no", **OPTIONS)
    return result.state, result.history, [event.text for event in sink.events if isinstance(event, Noted)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_end_after_the_same_epoch(run_ranks, ranks):
    """The run is finished, and a note says why."""
    results = run_ranks(ranks, scored)
    for state, history, _ in results:
        assert ("finished", [1.0, 5.0, 4.0, 3.0]) == (state, [row["score"] for row in history])
    assert [note for note in results[0][2] if "early" in note] == [
        "the run ends early: score has not improved for 2 epochs on 5 of epoch 2"
    ]


def test_an_epoch_that_improves_goes_on():
    """Up to the last one."""
    result, _ = alone(mlp(), classes(16), step=Scored([*range(9)]), check="no", **OPTIONS)
    assert 9 == len(result.history)


def test_what_ended_early_stays_ended(tmp_path):
    """Resumed with the same patience it ends at once, with its weights; with a larger one it goes on."""
    options = {**OPTIONS, "check": "no", "checkpoint": str(tmp_path)}
    step = Scored([1.0, 5.0, 4.0, 3.0, 9.0])
    first, weights = alone(mlp(), classes(16), step=step, **options)
    sink = ListSink()
    again, same = alone(mlp(), classes(16), step=step, resume=True, sinks=[sink], **options)
    assert any("the run ends early" in event.text for event in sink.events if isinstance(event, Noted))
    assert losses(first) == losses(again)
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
    longer, _ = alone(mlp(), classes(16), step=step, resume=True, **{**options, "early_stop": "score:4"})
    assert [1.0, 5.0, 4.0, 3.0, 9.0] == [row["score"] for row in longer.history][:5]
