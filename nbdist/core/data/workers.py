"""DataLoader worker processes: they end with their rank, even if it is killed, and send whatever they have loaded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import context
from typing import Any

from torch.utils import data as torch_data

from nbdist import interrupts
from nbdist.core.process import rng
from nbdist.errors import TaskError
from nbdist.upstream.multiprocessing_private import send_anything

__all__ = ["EndsWithRank", "SeededSlices", "loading_of", "started", "with_its_rank", "worker_errors"]

_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w[\w ]*)|exited unexpectedly)"
)


class EndsWithRank:
    """A ``worker_init_fn`` that ends a worker whose rank died before the worker started; see also `send_anything`.

    torch's worker polls whether its parent has changed, but misses a parent that died before the first poll. The worker
    is not killed together with the rank (PR_SET_PDEATHSIG), because it may still have to unlink shared memory.

    Args:
        then: The user's own ``worker_init_fn``, or None.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        self._rank_pid = os.getpid()

    def __call__(self, worker: int) -> None:
        """Called by torch in the worker process."""
        from_server = isinstance(multiprocessing.current_process(), getattr(context, "ForkServerProcess", ()))
        if os.name == "posix" and not from_server and os.getppid() != self._rank_pid:
            os._exit(1)
        send_anything()
        if self._then is not None:
            self._then(worker)


class SeededSlices(torch_data.Dataset[Any]):
    """A map-style data set that reads and collates the slices of one batch, each under its own seed.

    Args:
        dataset: The user's.
        collate: Turns a list of samples into a batch.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def __getitems__(self, request: list[tuple[int, list[Any]]]) -> list[Any]:
        """Read the slices: for each its seed, and the keys of its samples."""
        slices = []
        for seed, keys in request:
            rng.seed_all(seed)
            slices.append(self._collate(self._samples(keys)))
        return slices

    def _samples(self, keys: list[Any]) -> list[Any]:
        if callable(getattr(self._dataset, "__getitems__", None)):
            return list(self._dataset.__getitems__(keys))
        samples = []
        for key in keys:
            try:
                samples.append(self._dataset[key])
            except Exception as error:
                if hasattr(error, "add_note"):  # since Python 3.11
                    error.add_note(f"while sample {key!r} of the data was read")
                raise
        return samples


def loading_of(loading: dict[str, Any]) -> dict[str, Any]:
    """The settings of a DataLoader whose workers, if any, end with this rank."""
    if not loading.get("num_workers"):
        return loading
    return {**loading, "worker_init_fn": EndsWithRank(loading.get("worker_init_fn"))}


def started(loader: Iterable[Any]) -> Iterator[Any]:
    """The iterator of a loader, with its workers started. Local.

    An interrupt meanwhile comes afterwards: right after a fork it would leave a worker that no iterator ends.
    """
    with interrupts.delayed():
        return iter(loader)


@contextlib.contextmanager
def with_its_rank(ready: Any) -> Iterator[None]:
    """Context in which the DataLoader that gives ready-made batches, if one does, starts such workers. Local."""
    held = (ready, *vars(ready).values()) if hasattr(ready, "__dict__") else (ready,)
    held += tuple(item for value in held if type(value) in (list, tuple) for item in value[:100])
    loaders = [one for one in held if isinstance(one, torch_data.DataLoader) and one.num_workers]
    before = [loader.worker_init_fn for loader in loaders]
    for loader in loaders:
        loader.worker_init_fn = EndsWithRank(loader.worker_init_fn)
    try:
        yield
    finally:
        for loader, own in zip(loaders, before, strict=True):
            loader.worker_init_fn = own


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Context in which the death of a worker is one sentence; torch may notice it anywhere, by a signal. Local.

    Raises:
        TaskError: A worker has died.
    """
    try:
        yield
    except RuntimeError as error:
        died = _DIED.search(str(error))
        if died is None or isinstance(error, TaskError):
            raise
        how = f"killed ({died[2].strip()})" if died[2] else "ended by itself or killed"
        raise TaskError(
            f"a loading process (pid {died[1].strip()}) was {how}: if memory ran out, the most frequent reason, "
            "use fewer num_workers or smaller batches."
        ) from None
