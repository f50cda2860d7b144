"""Running the user's model in a dry run, and restoring all that its forward can change afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from nbdist.core.params.extra_state import extra_states, set_extra_states
from nbdist.core.params.program_state import ProgramState
from nbdist.core.process.rng import fork_rng

__all__ = ["device_of", "preserve_model"]


@contextlib.contextmanager
def preserve_model(model: nn.Module) -> Iterator[None]:
    """Restore what the model's forward can change, and all random states, at the end of the context. Local.

    These are its attributes, buffers and extra states, and all Python objects that it reaches, such as a counter in an
    object of the user's, or in a global. The values of parameters are left out: a dry run changes none. Inside,
    gradients are enabled and autocast is off, whatever holds outside.
    """
    device = device_of(model)
    state = ProgramState({"model": model}, unwritten=model.parameters(), most=None)
    extra = copy.deepcopy(extra_states(model))  # an object that is not Python's shows its state there alone
    with (
        fork_rng(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            yield
        finally:
            state.restore()
            set_extra_states(model, extra)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
