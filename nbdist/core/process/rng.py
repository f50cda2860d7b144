"""Random numbers as a function of where a run stands, so that nothing about them needs to be stored."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nbdist.errors import PlanError

__all__ = ["derive", "kept", "load_state_dict", "seed_all", "seed_torch", "set_state", "state", "state_dict"]


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
    torch.default_generator.set_state(first.cpu())
    for other in on_device:
        assert other is not None
        torch.cuda.set_rng_state(other.cpu(), device)


def seed_all(seed: int) -> None:
    """Seed torch, NumPy's legacy generator and `random` on the CPU: what data sets draw from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def state_dict() -> list[Any]:
    """Where NumPy's legacy generator and `random` stand, as JSON-able data. Local.

    A step of the user's may draw from them. To seed them in every step, as torch's generators are, would cost 20 us.
    """
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return [
        [name, np.asarray(keys).tobytes().hex(), *rest],
        [version, np.array(words, np.uint32).tobytes().hex(), gauss],
    ]


def load_state_dict(state_dict: list[Any]) -> None:
    """Let them stand where `state_dict` says. Local.

    Raises:
        PlanError: They cannot stand there.
    """
    try:
        (name, keys, *rest), (version, words, gauss) = state_dict
        np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), np.uint32), *rest))
        random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), np.uint32).tolist()), gauss))
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise PlanError(f"where the random numbers stood was not kept as nbdist keeps it ({error}).") from None


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
