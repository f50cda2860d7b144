"""Random numbers as a function of where a run stands, so that nothing about them needs to be stored."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["derive", "kept", "seed_all", "seed_torch", "set_state", "state"]


def derive(*path: int | str) -> int:
    """A 63-bit seed from a path such as ``(seed, "slice", step, index)``; different paths give unrelated seeds."""
    text = "/".join(map(str, path)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's global generators that `device` uses. Local, cheap enough for every slice."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def state(device: torch.device) -> list[torch.Tensor | None]:
    """Where the generators stand that `seed_torch` seeds, as tensors that can travel. Local."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.default_generator.get_state(), *on_device]


def set_state(states: list[torch.Tensor | None], device: torch.device) -> None:
    """Go on where `state` was taken, perhaps on another rank. Local."""
    first, *on_device = states
    assert first is not None
    torch.default_generator.set_state(first)
    for other in on_device:
        assert other is not None
        torch.cuda.set_rng_state(other.cpu(), device)


def seed_all(seed: int) -> None:
    """Seed torch, NumPy's legacy generator and `random` on the CPU: what data sets draw from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Give the caller's random state back at the end: a training leaves no trace in it."""
    numpy_state, random_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(random_state)
