"""A trace leaves nothing in torch."""

from __future__ import annotations

import signal

import pytest
import torch
from problems import mlp
from torch import fx, nn

from nbdist.core.strategies.pipeline.partition.call_signature import Call
from nbdist.core.strategies.pipeline.partition.tracing import KINDS, trace_forward


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_the_end_of_a_trace_leaves_no_tracer_in_torch(monkeypatch, kind):
    """torch.fx takes itself out of torch.nn.Module piece by piece: an interrupt comes when it is done."""
    patched = getattr(fx._symbolic_trace, "_PatchedFnSetAttr")  # noqa: B009 - private: there is no other way to be in time
    revert, came = patched.revert, []

    def interrupted(self):
        came.append(signal.raise_signal(signal.SIGINT))
        revert(self)

    monkeypatch.setattr(patched, "revert", interrupted)
    before = nn.Module.__call__, nn.Module.__getattr__
    call, _ = Call.of((torch.randn(2, 6, dtype=torch.float64),), {})
    with pytest.raises(KeyboardInterrupt):
        trace_forward(mlp(), call, kind)
    assert came
    assert before == (nn.Module.__call__, nn.Module.__getattr__)
