"""The checkpoint writer: writes snapshots to disk in the background, and publishes a checkpoint when it is complete.

A folder holds the last few checkpoints, each in a folder of its own: a safetensors file per rank, and a JSON file with
the checksum of each. A checkpoint is *published* when `newest.json` beside them names it; that file is replaced
atomically once all files are on disk. Nothing in a checkpoint is pickled, so reading one runs no code.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.optim.json_value import plain
from nbdist.core.params.param_table import ParamTable
from nbdist.core.state.checkpoint_format import FORMATS
from nbdist.core.state.checkpoint_reader import MANIFEST, NEWEST, CheckpointReader, checkpoints, sealed
from nbdist.core.state.checksum_files import SUM, hashed, replace_file, write_file, write_sum
from nbdist.core.state.folder_lease import Lease
from nbdist.core.state.restore import check_can_resume, check_same, load_whole
from nbdist.core.state.shard_plan import ShardPlan, gather_texts
from nbdist.core.state.snapshot import SnapshotBuffer
from nbdist.core.state.tensor_buffer import TensorLayout
from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.telemetry.host import host_name

__all__ = [
    "CheckpointWriter",
    "check_no_live_writer",
    "check_resume",
    "checkpoint_of_run",
    "load_checkpoint",
    "prepare",
]

_NAMES = f"{'[0-9a-f]' * 8}-step{'[0-9]' * 8}*"
THREAD = "nbdist checkpoint"
"""The name of the writing thread."""


def prepare(
    folder: str, optimizers: Mapping[str, torch.optim.Optimizer], channel: Channel, run_id: str
) -> Lease | None:
    """Create a checkpoint folder and check that all ranks can write to it. **Collective** over all ranks.

    Unpublished checkpoints of a killed run are removed.

    Returns:
        On rank 0 the lease of the folder, to be released after the last write.

    Raises:
        PlanError: A rank cannot write there, or another run does.
        TaskError: An optimizer has a setting that JSON cannot hold.
    """
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    for key, value in (item for group in groups for item in group.items()):
        if key != "params":
            plain(value, f"the optimizer's {key}")
    problem, lease = "", None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if channel.rank == 0:
            lease = Lease(folder, run_id).acquire()
            _remove_incomplete(Path(folder))
    except OSError as error:
        problem = f"rank {channel.rank} cannot write to checkpoint={folder!r} ({error.strerror}): name another folder."
    except PlanError as error:
        problem = str(error)
    with contextlib.ExitStack() as cleanup:
        if lease is not None:
            cleanup.callback(lease.release)
        for text in gather_texts(problem, channel):
            if text:
                raise PlanError(text)
        _check_shared(Path(folder), channel)
        cleanup.pop_all()
    return lease


def _check_shared(folder: Path, channel: Channel) -> None:
    """Raise `PlanError` if a rank does not see what rank 0 writes into a folder: it would be another one there."""
    if channel.size == 1:
        return
    token = folder / channel.broadcast_bytes(f".shared-{secrets.token_hex(8)}".encode()).decode()
    if channel.rank == 0:
        token.touch()
    gather_texts("", channel)  # a barrier
    blind = [text for text in gather_texts("" if token.exists() else host_name(), channel) if text]
    if channel.rank == 0:
        token.unlink()
    if blind:
        raise PlanError(
            f"the ranks do not share the folder checkpoint={str(folder)!r}: host {blind[0]} does not see what rank 0 "
            "writes there. Name a folder that all hosts see, such as one over NFS."
        )


def check_no_live_writer(folder: str, run_id: str) -> None:
    """Raise `PlanError` if a live run writes into a folder; a dead run has lost its lease. Local."""
    if os.path.isdir(folder):
        with contextlib.suppress(OSError):  # the ranks report it, from `prepare`
            Lease(folder, run_id).acquire().release()


def _remove_incomplete(folder: Path) -> None:
    with contextlib.suppress(PlanError):  # `newest.json` is unreadable: remove nothing
        complete = checkpoints(folder)
        for path in folder.glob(_NAMES):
            if path.name not in complete and (complete or not (path / MANIFEST).exists()):
                shutil.rmtree(path, ignore_errors=True)


def check_resume(plan: Plan, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Raise if a training cannot resume from `plan.resume`. Local; changes nothing and reads little.

    Raises:
        PlanError: There is no checkpoint, or none that this plan can resume from.
        TaskError: It is of another model or other optimizers.
    """
    folder = folder_to_resume(plan)
    if folder:
        saved = CheckpointReader.in_folder(folder, hashed=False)
        check_same(saved, ParamTable.of(model), optimizers)
        check_can_resume(saved, plan)


def folder_to_resume(plan: Plan) -> str:
    """The folder to resume from; empty if the training starts from scratch.

    Raises:
        PlanError: No folder is given.
    """
    if plan.resume is not True:
        return str(plan.resume)
    if not plan.checkpoint:
        raise PlanError("there is nothing to resume: name a folder, or use checkpoint=... and resume=True together.")
    return plan.checkpoint if checkpoints(Path(plan.checkpoint)) else ""


def checkpoint_of_run(plan: Plan, run_id: str) -> CheckpointReader | None:
    """The newest checkpoint that a run has written to its own folder; checks lengths and headers. Local."""
    if not (plan.checkpoint and run_id):
        return None
    with contextlib.suppress(PlanError):
        saved = CheckpointReader.in_folder(plan.checkpoint, hashed=False)
        if (saved.ranks[0]["position"].get("commands") or [""])[0] == run_id:
            return saved
    return None


def load_checkpoint(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load a checkpoint into an ordinary model, in place, whatever mesh it was saved on. Local.

    Args:
        folder: The folder given as ``--checkpoint`` (or ``checkpoint=``), or one of the checkpoints in it.
        model: The model, with any weights.
        optimizer: Over its parameters, to load its state too.

    Raises:
        PlanError: There is no checkpoint.
        TaskError: It is of another model or another optimizer; nothing has been changed.
    """
    load_whole(CheckpointReader.in_folder(folder), model, {} if optimizer is None else {"": optimizer})


class CheckpointWriter:
    """Writes this rank's file of checkpoints in a thread; rank 0 publishes a checkpoint when all files exist.

    Args:
        folder: Shared by all ranks.
        keep: How many checkpoints to keep.
        mark: A prefix of each checkpoint's name, unique to this run; the same on all ranks.
        rank: This rank.
        ranks: How many.
        lease: Of the folder, on rank 0.

    Attributes:
        problems: Messages about failures, until the snapshotter takes them.
        completed: Step, folder and seconds of each published checkpoint, until the snapshotter takes them.
    """

    def __init__(self, folder: str, keep: int, mark: str, rank: int, ranks: int, lease: Lease | None) -> None:
        self._folder = Path(folder)
        self._keep = keep
        self._mark = mark
        self._rank = rank
        self._ranks = ranks
        self._lease = lease
        self._thread: threading.Thread | None = None
        self._buffer: SnapshotBuffer | None = None
        self._step = -1
        self._name = ""
        self.failed = False
        self.problems: list[str] = []
        self.completed: list[tuple[int, str, float]] = []
        self._began_s = 0.0
        self._frozen: tuple[Path, str] | None = None  # the file of frozen weights written last, and its checksum

    @property
    def busy(self) -> bool:
        """Whether a checkpoint has begun and `finish` was not called yet: on all ranks the same."""
        return self._buffer is not None

    @property
    def working(self) -> bool:
        """Whether one is in progress or being published: the next one must wait for that."""
        return self.busy or (self._thread is not None and self._thread.is_alive())

    @property
    def done(self) -> bool:
        """Whether this rank has written its file of the one in progress, or has failed."""
        return self._buffer is not None and (self._thread is None or not self._thread.is_alive())

    def begin(self, buffer: SnapshotBuffer, step: int, shard_plan: ShardPlan, *, frozen: bool) -> None:
        """Start writing the snapshot in `buffer`, and with `frozen` the frozen parameters of `shard_plan`. Local."""
        self.wait()
        buffer.pinned = True
        # Never overwrite a published one: a run's final checkpoint may have the step of the one before it.
        self._name = f"{self._mark}-step{step:08}{'-end' if step == self._step else ''}"
        self._buffer, self._step, self.failed = buffer, step, False
        self._began_s = time.monotonic()
        self._start(self._write, buffer, shard_plan.frozen() if frozen else {}, shard_plan.frozen_changed)

    def wait(self) -> None:
        """Wait until this rank's write in progress is complete or has failed. Local."""
        if self._thread is not None:
            self._thread.join()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=self._work, args=(work, *args), daemon=True, name=THREAD)
        self._thread.start()

    def _work(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:  # any error: a checkpoint that was not written must not be published
            self.failed = True
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            self.problems.append(
                f"the checkpoint of step {self._step} could not be written ({reason}): the run continues, earlier "
                "checkpoints are intact."
            )

    def finish(self, whole: bool) -> None:
        """All ranks have reported: publish or discard the checkpoint. Local, on all ranks after the same step."""
        assert self._buffer is not None
        self._buffer.pinned, self._buffer = False, None
        if self._rank == 0:
            self._start(self._publish if whole else self._discard)

    def _write(
        self, buffer: SnapshotBuffer, frozen: dict[str, torch.Tensor], frozen_changed: Callable[[], bool]
    ) -> None:
        place = self._folder / self._name
        place.mkdir(exist_ok=True)
        write_file(place / f"rank{self._rank}.safetensors", [buffer.content])
        if frozen:
            self._write_frozen(place / f"rank{self._rank}-frozen.safetensors", frozen, frozen_changed)

    def _write_frozen(self, path: Path, frozen: dict[str, torch.Tensor], frozen_changed: Callable[[], bool]) -> None:
        """Write the frozen weights, or hard-link the file of the previous checkpoint if a hash shows no change.

        A hard link, so that each checkpoint stays complete when others are removed and when it is copied elsewhere.
        """
        layout = TensorLayout(frozen)

        def blocks() -> Iterator[torch.Tensor]:
            yield torch.frombuffer(bytearray(layout.header("")), dtype=torch.uint8)
            for key in layout.places:
                yield frozen[key].cpu().contiguous().view(-1).view(torch.uint8)

        if not self._link_frozen(path, blocks):
            self._frozen = path, write_file(path, blocks())
        if frozen_changed():
            raise RuntimeError("a step has changed weights that take no gradient, for the first time")

    def _link_frozen(self, path: Path, blocks: Callable[[], Iterable[torch.Tensor]]) -> bool:
        """Hard-link the last file of frozen weights, if its bytes are the same; returns whether that worked."""
        if self._frozen is None:
            return False
        before, checksum = self._frozen
        now, nbytes = hashed(blocks())
        if now != checksum:
            return False
        try:
            os.link(before, path)
        except OSError:  # a file system without links, or the file was removed
            return False
        write_sum(path, checksum, nbytes)
        self._frozen = path, checksum
        return True

    def _publish(self) -> None:
        """Publish the checkpoint in progress, and remove the oldest beyond `keep`."""
        try:
            before, names = self._complete()
        except BaseException:
            with contextlib.suppress(PlanError):
                if self._name not in checkpoints(self._folder):
                    self._discard()  # on a full disk, the next one needs its space
            raise
        self.completed.append((self._step, str(self._folder / self._name), time.monotonic() - self._began_s))
        for name in {*before} - {*names}:  # no others: another rank may have begun the next one
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _complete(self) -> tuple[list[str], list[str]]:
        """Write its manifest and add it to `newest.json`; returns the published names before and after."""
        place = self._folder / self._name
        files = {}
        for path in sorted(place.glob(f"*{SUM}")):
            checksum, nbytes = path.read_text().split()
            files[path.name.removesuffix(SUM)] = [int(nbytes), checksum]
        for rank in range(self._ranks):
            if f"rank{rank}.safetensors" not in files:
                raise FileNotFoundError(2, f"the file of rank {rank} is missing: all ranks must share the folder")
        replace_file(place / MANIFEST, sealed({"format": FORMATS[-1], "files": files}))
        for path in place.glob(f"*{SUM}"):
            path.unlink()
        if self._lease is not None:
            self._lease.confirm()
        before = checkpoints(self._folder)
        names = [name for name in before if not self._name.startswith(name)]
        names = [*names, self._name][-self._keep :]
        replace_file(self._folder / NEWEST, sealed({"checkpoints": names}))
        return before, names

    def _discard(self) -> None:
        shutil.rmtree(self._folder / self._name, ignore_errors=True)
