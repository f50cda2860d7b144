"""Random number generators: seeds are derived from (seed, epoch, step, slice), so no generator state must be saved."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nbdist.errors import PlanError

__all__ = [
    "derive", "derive_slice", "drawn_since", "fork_rng", "generators", "get_state", "load_state_dict", "seed_all",
    "seed_torch", "set_state", "state_dict",
]  # fmt: skip

_BLOCK, _SLICES = 32, 1024


def derive(*path: int | str) -> int:
    """A 63-bit seed from a path such as ``(seed, "slice", step, index)``; different paths give unrelated seeds."""
    text = "/".join(map(str, path)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def derive_slice(seed: int, path: tuple[Any, ...], index: int) -> int:
    """``derive(seed, *path, index)`` for a slice, whose path is a word and the number of its step or batch. Local."""
    if index >= _SLICES:  # the cache would never be hit
        return derive(seed, *path, index)
    kind, number = path
    derived: int = _block(seed, kind, number // _BLOCK, index)[number % _BLOCK]
    return derived


@functools.lru_cache(_SLICES)  # which come in turn
def _block(seed: int, kind: str, block: int, index: int) -> list[int]:
    # Together, because in each small step the hash's code has left the processor's cache, and takes ten times as long.
    return [derive(seed, kind, number, index) for number in range(block * _BLOCK, (block + 1) * _BLOCK)]


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's global generators for the CPU and `device`. Local, cheap enough for every slice."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def get_state(device: torch.device) -> list[torch.Tensor | None]:
    """The states of the generators that `seed_torch` seeds, as tensors that can be sent. Local."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.default_generator.get_state(), *on_device]


def set_state(states: list[torch.Tensor | None], device: torch.device) -> None:
    """Set the generators to the `get_state` of this or another rank. Local."""
    first, *on_device = states
    assert first is not None
    torch.default_generator.set_state(first.cpu())
    for other in on_device:
        assert other is not None
        torch.cuda.set_rng_state(other.cpu(), device)


def seed_all(seed: int) -> None:
    """Seed torch's CPU generator, NumPy's legacy generator and `random`: data sets use these."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def state_dict() -> list[Any]:
    """The states of NumPy's legacy generator and of `random`, as JSON-able data. Local.

    The user's step may use them. They are not seeded in every step, as torch's generators are: that would cost 20 us.
    """
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return [
        [name, np.asarray(keys).tobytes().hex(), *rest],
        [version, np.array(words, np.uint32).tobytes().hex(), gauss],
    ]


def load_state_dict(state_dict: list[Any]) -> None:
    """Set NumPy's legacy generator and `random` to a `state_dict`. Local.

    Raises:
        PlanError: It is not a valid state.
    """
    try:
        (name, keys, *rest), (version, words, gauss) = state_dict
        np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), np.uint32), *rest))
        random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), np.uint32).tolist()), gauss))
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise PlanError(f"the saved random number generator state is not in nbdist's format ({error}).") from None


Generators = tuple[list[Any], list[Any]]
"""The states of torch's generators, and of Python's and NumPy's."""


def generators(device: torch.device) -> Generators:
    """The states of all generators that a step may draw from, for `drawn_since`. Local."""
    return get_state(device), state_dict()


def drawn_since(before: Generators, device: torch.device) -> tuple[bool, bool]:
    """Whether random numbers were drawn since `generators`: from torch's, and from Python's or NumPy's. Local."""
    (of_torch, elsewhere), (now, others) = before, generators(device)
    return not all(map(torch.equal, of_torch, now)), others != elsewhere


@contextlib.contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Restore the caller's generator states (torch, NumPy, `random`) at the end of the context."""
    numpy_state, random_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(random_state)
