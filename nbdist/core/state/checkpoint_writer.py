"""Checkpoints on disk: a snapshot written in the background, whole or not at all.

A folder holds the last few checkpoints, each in a folder of its own: a safetensors file a rank, and a JSON file with
the checksum of each. It counts only once `newest.json` beside them names it, which is replaced in one stroke when all
of it lies on the disk. Nothing in a checkpoint is pickled, so that reading one runs no code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.optim.json_value import plain
from nbdist.core.params.table import ParamTable
from nbdist.core.state.checked_files import SUM, hashed, replace_file, write_file, write_sum
from nbdist.core.state.checkpoint_reader import ABOUT, FORMAT, NEWEST, CheckpointReader, checkpoints, sealed
from nbdist.core.state.folder_lease import Lease
from nbdist.core.state.restore import check_goes_on, check_same, load_whole
from nbdist.core.state.shard_plan import ShardPlan, from_all
from nbdist.core.state.snapshot import SnapshotBuffer
from nbdist.core.state.tensor_buffer import TensorLayout
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["CheckpointWriter", "check_free", "check_resume", "checkpoint_of_run", "load_checkpoint", "prepare"]

_NAMES = f"{'[0-9a-f]' * 8}-step{'[0-9]' * 8}*"
THREAD = "nbdist checkpoint"
"""The name of the thread that writes."""


def prepare(folder: str, optimizer: torch.optim.Optimizer, channel: Channel, run_id: str) -> Lease | None:
    """See to it that a training's state can be written; makes the folder. **Collective** over all ranks.

    What a run that was killed has left half written is removed.

    Returns:
        On rank 0 the lease of the folder: to be released when nothing is to be written any more.

    Raises:
        PlanError: A rank cannot write there, or another run does.
        TaskError: The optimizer has a setting that JSON cannot hold.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params":
                plain(value, f"the optimizer's {key}")
    problem, lease = "", None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if channel.rank == 0:
            lease = Lease(folder, run_id).acquire()
            _tidy_up(Path(folder))
    except OSError as error:
        problem = f"rank {channel.rank} cannot write to checkpoint={folder!r} ({error.strerror}): name another folder."
    except PlanError as error:
        problem = str(error)
    with contextlib.ExitStack() as undo:
        if lease is not None:
            undo.callback(lease.release)
        for told in from_all(problem, channel):
            if told:
                raise PlanError(told)
        undo.pop_all()
    return lease


def check_free(folder: str, run_id: str) -> None:
    """Raise `PlanError` where a run that lives writes into a folder; one that is dead has lost it. Local."""
    if os.path.isdir(folder):
        with contextlib.suppress(OSError):  # the ranks say it
            Lease(folder, run_id).acquire().release()


def _tidy_up(folder: Path) -> None:
    with contextlib.suppress(PlanError):  # unreadable: what is there may be all that is left
        known = checkpoints(folder)
        for path in folder.glob(_NAMES):
            if path.name not in known and (known or not (path / ABOUT).exists()):
                shutil.rmtree(path, ignore_errors=True)


def check_resume(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise where a training cannot go on from `plan.resume`. Local; nothing is changed, and little is read.

    Raises:
        PlanError: There is no checkpoint, or not one to go on from.
        TaskError: It is another model's or another optimizer's.
    """
    folder = resumed_folder(plan)
    if folder:
        saved = CheckpointReader.in_folder(folder, hashed=False)
        check_same(saved, ParamTable.of(model), optimizer)
        check_goes_on(saved, plan)


def resumed_folder(plan: Plan) -> str:
    """The folder to go on from; empty where a training begins at its beginning.

    Raises:
        PlanError: No folder is named.
    """
    if plan.resume is not True:
        return str(plan.resume)
    if not plan.checkpoint:
        raise PlanError("there is nothing to resume: name a folder, or use checkpoint=... and resume=True together.")
    return plan.checkpoint if checkpoints(Path(plan.checkpoint)) else ""


def checkpoint_of_run(plan: Plan, run_id: str) -> CheckpointReader | None:
    """The newest checkpoint that a run has written to its own folder, by its lengths and headers. Local."""
    if not (plan.checkpoint and run_id):
        return None
    with contextlib.suppress(PlanError):
        saved = CheckpointReader.in_folder(plan.checkpoint, hashed=False)
        if (saved.ranks[0]["position"].get("commands") or [""])[0] == run_id:
            return saved
    return None


def load_checkpoint(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a checkpoint into an ordinary model, in place, whatever mesh it was made on. Local.

    Args:
        folder: What ``--checkpoint`` (or ``checkpoint=``) named, or one of the checkpoints in it.
        model: The model, with any weights.
        optimizer: Over its parameters, if its state is wanted too.

    Raises:
        PlanError: There is no checkpoint.
        TaskError: It is another model's or another optimizer's; nothing has been changed.
    """
    load_whole(CheckpointReader.in_folder(folder), model, optimizer)


class CheckpointWriter:
    """Writes this rank's share of checkpoints in a thread; rank 0 lets a checkpoint count when all shares are there.

    Args:
        folder: Seen by all ranks.
        keep: How many checkpoints stay.
        mark: Begins the name of each one, unlike that of any other run; the same on all ranks.
        rank: This rank.
        ranks: How many.
        lease: Of the folder, on rank 0.

    Attributes:
        problems: What went wrong, in sentences, until somebody takes it from there.
        counted: Of each checkpoint that has come to count its step, its folder, and the seconds it took; likewise.
    """

    def __init__(self, folder: str, keep: int, mark: str, rank: int, ranks: int, lease: Lease | None) -> None:
        self._folder = Path(folder)
        self._keep = keep
        self._mark = mark
        self._rank = rank
        self._ranks = ranks
        self._lease = lease
        self._thread: threading.Thread | None = None
        self._slot: SnapshotBuffer | None = None
        self._step = -1
        self._name = ""
        self.failed = False
        self.problems: list[str] = []
        self.counted: list[tuple[int, str, float]] = []
        self._began_s = 0.0
        self._frozen: tuple[Path, str] | None = None  # the file of frozen weights written last, and its checksum

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way on this rank that has not been settled: on all ranks the same."""
        return self._slot is not None

    @property
    def working(self) -> bool:
        """Whether one is under way, or is being let count: not before that is done may the next one begin."""
        return self.busy or (self._thread is not None and self._thread.is_alive())

    @property
    def done(self) -> bool:
        """Whether this rank's share of the one under way has been written, or could not be."""
        return self._slot is not None and (self._thread is None or not self._thread.is_alive())

    def begin(self, slot: SnapshotBuffer, step: int, pieces: ShardPlan) -> None:
        """Begin to write what `slot` holds, and what of `pieces` is frozen. Local."""
        self.wait()
        slot.pinned = True
        # One that counts is never written over: the last one of a run may have the step of the one before it.
        self._name = f"{self._mark}-step{step:08}{'-end' if step == self._step else ''}"
        self._slot, self._step, self.failed = slot, step, False
        self._began_s = time.monotonic()
        self._start(self._write, slot, pieces.frozen(), pieces.moved)

    def wait(self) -> None:
        """Wait until what this rank has begun to write has been written, or could not be. Local."""
        if self._thread is not None:
            self._thread.join()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=self._work, args=(work, *args), daemon=True, name=THREAD)
        self._thread.start()

    def _work(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:  # whatever it is, what was not written must not count
            self.failed = True
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            self.problems.append(
                f"the checkpoint of step {self._step} could not be written ({reason}): the run goes on, the "
                "checkpoints before it are whole."
            )

    def settle(self, whole: bool) -> None:
        """All ranks have told how it went: let the checkpoint count, or forget it. Local, at once on all ranks."""
        assert self._slot is not None
        self._slot.pinned, self._slot = False, None
        if self._rank == 0:
            self._start(self._count if whole else self._forget)

    def _write(self, slot: SnapshotBuffer, frozen: dict[str, torch.Tensor], moved: Callable[[], bool]) -> None:
        place = self._folder / self._name
        place.mkdir(exist_ok=True)
        write_file(place / f"rank{self._rank}.safetensors", [slot.image])
        if frozen:
            self._write_frozen(place / f"rank{self._rank}-frozen.safetensors", frozen, moved)

    def _write_frozen(self, path: Path, frozen: dict[str, torch.Tensor], moved: Callable[[], bool]) -> None:
        """Write the weights that do not change, or let the file of the checkpoint before stand in this one too.

        A link, so that each checkpoint stays whole when others are removed and when it is copied elsewhere. That they
        have not changed is seen from all of their bytes.
        """
        layout = TensorLayout(frozen)

        def blocks() -> Iterator[torch.Tensor]:
            yield torch.frombuffer(bytearray(layout.header("")), dtype=torch.uint8)
            for key in layout.places:
                yield frozen[key].cpu().contiguous().view(-1).view(torch.uint8)

        if not self._link_frozen(path, blocks):
            self._frozen = path, write_file(path, blocks())
        if moved():
            raise RuntimeError("a step has changed weights that take no gradient, for the first time")

    def _link_frozen(self, path: Path, blocks: Callable[[], Iterable[torch.Tensor]]) -> bool:
        """Let the file of frozen weights that was written last have another name; False where that cannot be."""
        if self._frozen is None:
            return False
        before, checksum = self._frozen
        now, nbytes = hashed(blocks())
        if now != checksum:
            return False
        try:
            os.link(before, path)
        except OSError:  # a file system without links, or somebody has removed the file
            return False
        write_sum(path, checksum, nbytes)
        self._frozen = path, checksum
        return True

    def _count(self) -> None:
        """Let the checkpoint under way count, and remove those that are too many."""
        try:
            before, names = self._complete()
        except BaseException:
            with contextlib.suppress(PlanError):
                if self._name not in checkpoints(self._folder):
                    self._forget()  # on a full disk, the next one needs the room
            raise
        self.counted.append((self._step, str(self._folder / self._name), time.monotonic() - self._began_s))
        for name in {*before} - {*names}:  # only these: another rank may have begun with the next one
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _complete(self) -> tuple[list[str], list[str]]:
        """Put the checkpoint under way behind those that count; returns their names before and after."""
        place = self._folder / self._name
        files = {}
        for told in sorted(place.glob(f"*{SUM}")):
            checksum, nbytes = told.read_text().split()
            files[told.name.removesuffix(SUM)] = [int(nbytes), checksum]
        for rank in range(self._ranks):
            if f"rank{rank}.safetensors" not in files:
                raise FileNotFoundError(2, f"the file of rank {rank} is not there: all ranks have to see the folder")
        replace_file(place / ABOUT, sealed({"format": FORMAT, "files": files}))
        for told in place.glob(f"*{SUM}"):
            told.unlink()
        if self._lease is not None:
            self._lease.confirm()
        before = checkpoints(self._folder)
        names = [name for name in before if not self._name.startswith(name)]
        names = [*names, self._name][-self._keep :]
        replace_file(self._folder / NEWEST, sealed({"checkpoints": names}))
        return before, names

    def _forget(self) -> None:
        shutil.rmtree(self._folder / self._name, ignore_errors=True)
