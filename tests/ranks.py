"""Ranks as real processes: what the `run_ranks` fixture runs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from nbdist.core.comm.rendezvous import connect_store
from nbdist.core.comm.world import World, host_store
from nbdist.core.strategies import choice
from nbdist.errors import PeerLostError

_JOIN_S = 300.0  # ends a hung suite
HOSTS = {"two hosts": 2, "three hosts": 3, "eight hosts": 8}


class RemoteTraceback(Exception):
    """Holds the text of a rank's traceback, as the cause of the error that is raised again here."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class RankPool:
    """Starts ranks from one fork server that has torch loaded, so that a world costs a fraction of a second."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "nbdist.core", "torch._dynamo"])
        self._store, self._generation = host_store(), 0
        self(1, _nothing)  # the fork server starts here, once and for all

    def __call__(
        self, size: int, function: Callable[..., Any], *args: Any, channel: str = "shared memory", device: str = "cpu"
    ) -> list[Any]:
        """Call ``function(world, *args)`` on `size` ranks that share a world, and return what each one returned.

        The `channel` is "shared memory", "process group", or "two hosts" or "three hosts", which is both. "shared
        weights" is shared memory, and the ranks share the weights however few they are. On `device` "cuda" they share
        the GPUs, and `channel` has no effect.

        Raises:
            Exception: What a rank raised: the first one that is not secondary (a PeerLostError).
        """
        self._generation += 10  # a test may form further worlds, of the next generations
        where = self._store.address, self._generation
        job = pickle.dumps((function, args))  # plain pickle: torch's own would go through /dev/shm
        readers, processes = [], []
        try:
            for rank in range(size):
                reader, writer = self._context.Pipe(duplex=False)
                process = self._context.Process(
                    target=_rank_main, args=(rank, size, *where, writer, job, channel, device)
                )
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            return _collect(readers)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join(_JOIN_S)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()
            for reader in readers:
                reader.close()


def _nothing(world: World) -> None:
    pass


def _collect(readers: list[Connection]) -> list[Any]:
    outcomes: dict[Connection, tuple[Any, BaseException | None, str]] = {}
    while len(outcomes) < len(readers):
        for reader in wait([r for r in readers if r not in outcomes]):
            try:
                outcomes[reader] = pickle.loads(reader.recv_bytes())
            except EOFError:
                outcomes[reader] = None, RuntimeError(f"rank {readers.index(reader)} died without a result"), ""
    failures = [(error, text) for _, error, text in map(outcomes.get, readers) if error is not None]
    for error, text in sorted(failures, key=lambda failure: isinstance(failure[0], PeerLostError)):
        raise error from RemoteTraceback(text)
    return [outcomes[reader][0] for reader in readers]


def _rank_main(
    rank: int, size: int, address: tuple[str, str], generation: int, writer: Connection, job: bytes, channel: str,
    device: str,
) -> None:  # fmt: skip
    multiprocessing.set_start_method(None, force=True)  # so that a rank itself can start processes in any way
    torch.set_num_threads(1)
    os.environ["NBDIST_CHANNEL"] = channel.replace(" ", "_")
    if channel == "shared weights":
        choice.SHARED_ABOVE = 0
    if channel in HOSTS:
        os.environ["NBDIST_HOST"] = f"host {rank * HOSTS[channel] // size}"
    outcome: tuple[Any, BaseException | None, str]
    world = None
    try:
        store = connect_store(*address)
        world = World.form(
            store=store, rank=rank, size=size, local_rank=rank, local_size=size, device=device, generation=generation
        )
        function, args = pickle.loads(job)
        outcome = function(world, *args), None, ""
    except BaseException as error:
        outcome = None, error, traceback.format_exc()
    finally:
        if world is not None:
            world.leave()
    writer.send_bytes(pickle.dumps(outcome))
