"""The feed: what rank 0 alone reads (streams, ready-made batches, samplers), sent to the other ranks as it is read."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nbdist.core.comm import Link
from nbdist.core.comm.world import World
from nbdist.core.data.sources import Source
from nbdist.errors import PeerLostError
from nbdist.plan import Mesh
from nbdist.upstream.multiprocessing_private import by_value

__all__ = ["Feed", "digest"]

_DIGEST = hashlib.sha256


class Feed:
    """A link from rank 0 to each other rank of a world. **Collective**: all ranks construct it.

    A send waits for no other rank. What is sent is pickled without its tensors, and signed with the world's secret;
    tensors go beside it.

    Args:
        world: The ranks; by default this process alone.
        places: Of each rank, its place on the axis over which the data is distributed. Ranks of a place read the same.
    """

    def __init__(self, world: World | None = None, places: Sequence[int] = (0,)) -> None:
        size = 1 if world is None else world.size
        self.places = tuple(places)
        self.is_first = world is None or world.rank == 0
        self._secret: bytes = getattr(getattr(world, "store", None), "secret", b"")
        self._links: dict[int, Link] = {}
        if world is not None and size > 1:
            self._links = world.links([(0, rank) for rank in range(1, size)])

    @classmethod
    def of(cls, sources: Iterable[Source | None], world: World, mesh: Mesh, cleanup: contextlib.ExitStack) -> Feed:
        """One for what rank 0 reads of `sources`; without links where it reads none of them for others. **Collective**.

        Args:
            sources: Of a run.
            world: The ranks.
            mesh: Of the run.
            cleanup: Closes it.
        """
        if not any(source is not None and source.is_fed for source in sources):
            return cls()
        feed = cls(world, mesh.data_places)
        cleanup.callback(feed.close)
        return feed

    @property
    def count(self) -> int:
        """Places on the axis."""
        return 1 + max(self.places)

    def send(self, of_place: Callable[[int], Any]) -> None:
        """Send each other rank what is for its place; returns before they have it. Rank zero only.

        Raises:
            PeerLostError: A rank is gone.
        """
        packed: dict[int, tuple[bytes, list[torch.Tensor]]] = {}
        for rank, link in self._links.items():
            place = self.places[rank]
            if place not in packed:
                packed[place] = _packed(of_place(place))
            code, tensors = packed[place]
            signed = bytearray(hmac.digest(self._secret, code, _DIGEST) + code)
            link.send(None, [torch.frombuffer(signed, dtype=torch.uint8), *tensors])

    def receive(self) -> Any:
        """Wait for what rank 0 sends next; an interrupt lands at once. On other ranks only.

        Raises:
            PeerLostError: Rank 0 is gone, or a message is not its.
        """
        _, (signed, *tensors) = self._links[0].receive()
        assert signed is not None
        content = signed.numpy().tobytes()
        length = _DIGEST().digest_size
        if not hmac.compare_digest(content[:length], hmac.digest(self._secret, content[length:], _DIGEST)):
            raise PeerLostError("a message about the data is not rank 0's: its signature is wrong.")
        return _Unpickler(io.BytesIO(content[length:]), tensors).load()

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank. **Collective** over the world; `make` runs on rank 0 only."""
        if not self.is_first:
            return self.receive()
        value = make()
        self.send(lambda _place: value)
        return value

    def close(self) -> None:
        """Close the links. Local, twice is fine."""
        for link in self._links.values():
            link.close()


def digest(value: Any) -> bytes:
    """16 bytes that depend on the values in a batch, and not on where they lie. Local."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, all_tensors=True)
    try:
        pickler.dump(value)
        code = stream.getvalue()
    except Exception:  # of a class that cannot be pickled
        code = repr(value).encode()
    made = hashlib.blake2b(code, digest_size=16)
    for tensor in pickler.tensors:
        flat = tensor.detach().as_subclass(torch.Tensor).cpu().to_dense().resolve_conj().resolve_neg().contiguous()
        made.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        made.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.digest()


def _packed(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    return stream.getvalue(), pickler.tensors


class _Pickler(pickle.Pickler):
    """Pickles all but plain tensors, or but all tensors, which it collects."""

    def __init__(self, file: io.BytesIO, *, all_tensors: bool = False) -> None:
        super().__init__(file, protocol=5)
        self._all_tensors = all_tensors
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The place of a tensor in `tensors`; None for all else."""
        if not (isinstance(value, torch.Tensor) if self._all_tensors else _is_plain(value)):
            return None
        place = self._places.setdefault(id(value), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(value)  # and kept, so that no id comes twice
        return place

    def reducer_override(self, value: Any) -> Any:
        """Send classes and functions of the notebook by value, others by name."""
        return by_value(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Any]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Any:
        """The tensor of that place."""
        return self._tensors[place]


def _is_plain(tensor: Any) -> bool:
    """Whether an object is a tensor of which values, dtype and shape are all."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)
    )
