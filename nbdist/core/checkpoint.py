"""Checkpoints on disk: a snapshot written in the background, whole or not at all.

A folder holds the last few checkpoints, each in a folder of its own: a safetensors file a rank, and a JSON file with
the checksum of each. It counts only once `newest.json` beside them names it, which is replaced in one stroke when all
of it lies on the disk. Nothing in a checkpoint is pickled, so that reading one runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbdist.core.channels import Channel
from nbdist.core.image import Layout
from nbdist.core.params import ParamTable
from nbdist.core.pieces import from_all, plain
from nbdist.core.restore import check_goes_on, check_same, load_whole
from nbdist.core.saved import ABOUT, FORMAT, NEWEST, Saved, checkpoints, checksum_of_text
from nbdist.core.snapshot import Slot
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["CheckpointWriter", "check_resume", "load_checkpoint", "prepare"]

_NAMES = f"{'[0-9a-f]' * 8}-step{'[0-9]' * 8}"
_SUM = ".sha256"
_BLOCK_BYTES = 1 << 20


def prepare(plan: Plan, optimizer: torch.optim.Optimizer, channel: Channel) -> None:
    """See to it, before a training, that its state can be written; makes the folder. **Collective** over all ranks.

    What a run that was killed has left half written is removed.

    Raises:
        PlanError: A rank cannot write there.
        TaskError: The optimizer has a setting that JSON cannot hold.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params":
                plain(value, f"the optimizer's {key}")
    folder, problem = plan.checkpoint, ""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if channel.rank == 0:
            _tidy_up(Path(folder))
    except OSError as error:
        problem = f"rank {channel.rank} cannot write to checkpoint={folder!r} ({error.strerror}): name another folder."
    for told in from_all(problem, channel):
        if told:
            raise PlanError(told)


def _tidy_up(folder: Path) -> None:
    with contextlib.suppress(PlanError):  # unreadable: what is there may be all that is left
        for name in {path.name for path in folder.glob(_NAMES)} - {*checkpoints(folder)}:
            shutil.rmtree(folder / name, ignore_errors=True)


def check_resume(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise where a training cannot go on from `plan.resume`. Local; nothing is changed.

    Raises:
        PlanError: There is no checkpoint, or not one to go on from.
        TaskError: It is another model's or another optimizer's.
    """
    folder = resumed_folder(plan)
    if folder:
        saved = Saved.in_folder(folder)
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
    load_whole(Saved.in_folder(folder), model, optimizer)


class CheckpointWriter:
    """Writes this rank's share of checkpoints in a thread; rank 0 lets a checkpoint count when all shares are there.

    Args:
        folder: Seen by all ranks.
        keep: How many checkpoints stay.
        mark: Begins the name of each one, unlike that of any other run; the same on all ranks.
        rank: This rank.
        ranks: How many.
    """

    def __init__(self, folder: str, keep: int, mark: str, rank: int, ranks: int) -> None:
        self._folder = Path(folder)
        self._keep = keep
        self._mark = mark
        self._rank = rank
        self._ranks = ranks
        self._thread: threading.Thread | None = None
        self._slot: Slot | None = None
        self._name = ""
        self.problem = ""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way on this rank, or has not been settled."""
        return self._slot is not None

    @property
    def done(self) -> bool:
        """Whether this rank's share of the one under way has been written, or could not be."""
        return self._slot is not None and (self._thread is None or not self._thread.is_alive())

    def begin(self, slot: Slot, step: int, frozen: Mapping[str, torch.Tensor]) -> None:
        """Begin to write what `slot` holds, and `frozen`, which nobody changes. Local."""
        slot.pinned = True
        self._slot, self._name, self.problem = slot, f"{self._mark}-step{step:08}", ""
        self._thread = threading.Thread(target=self._write, args=(slot, dict(frozen)), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until this rank's share has been written, or could not be. Local."""
        if self._thread is not None:
            self._thread.join()

    def settle(self, whole: bool) -> None:
        """All ranks have told how it went: let the checkpoint count, or forget it. Local, at once on all ranks."""
        assert self._slot is not None
        self._slot.pinned, self._slot = False, None
        if self._rank == 0:
            self._thread = threading.Thread(target=self._count if whole else self._forget, daemon=True)
            self._thread.start()

    def _write(self, slot: Slot, frozen: dict[str, torch.Tensor]) -> None:
        place = self._folder / self._name
        try:
            place.mkdir(exist_ok=True)
            _write_file(place / f"rank{self._rank}.safetensors", [slot.image])
            if frozen:
                layout = Layout(frozen)
                tensors = (frozen[key].cpu().contiguous().view(-1).view(torch.uint8) for key in layout.places)
                header = torch.frombuffer(bytearray(layout.header("")), dtype=torch.uint8)
                _write_file(place / f"rank{self._rank}-frozen.safetensors", [header, *tensors])
        except OSError as error:
            self.problem = (
                f"the checkpoint of step {int(self._name[-8:])} could not be written ({error.strerror}): the run goes "
                "on, the checkpoints before it are whole."
            )

    def _count(self) -> None:
        """Let the checkpoint under way count, and remove those that are too many."""
        place = self._folder / self._name
        try:
            files = {}
            for told in sorted(place.glob(f"*{_SUM}")):
                checksum, nbytes = told.read_text().split()
                files[told.name.removesuffix(_SUM)] = [int(nbytes), checksum]
            about: dict[str, Any] = {"format": FORMAT, "files": files}
            _replace(place / ABOUT, {**about, "checksum": checksum_of_text(about)})
            for told in place.glob(f"*{_SUM}"):
                told.unlink()
            known = [name for name in checkpoints(self._folder) if name != self._name]
            names = [*known, self._name][-self._keep :]
            _replace(self._folder / NEWEST, {"checkpoints": names})
        except (OSError, PlanError) as error:
            self.problem = f"the checkpoint of step {int(self._name[-8:])} could not be completed ({error})."
            return
        for name in {*known, *(path.name for path in self._folder.glob(f"{self._mark}-step*"))} - {*names}:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _forget(self) -> None:
        shutil.rmtree(self._folder / self._name, ignore_errors=True)


def _write_file(path: Path, blocks: Iterable[torch.Tensor]) -> None:
    """Write bytes to a file and its checksum beside it, and see them through to the disk.

    Neither hashing nor writing holds Python's lock, so that the training goes on beside it.
    """
    digest, nbytes = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            for piece in block.split(_BLOCK_BYTES):
                content = memoryview(piece.numpy())
                digest.update(content)
                while content:
                    written = file.write(content)
                    nbytes += written
                    content = content[written:]
        os.fsync(file.fileno())
    told = path.with_name(path.name + _SUM)
    with told.open("w") as text:
        text.write(f"{digest.hexdigest()} {nbytes}")
        text.flush()
        os.fsync(text.fileno())


def _replace(path: Path, value: Any) -> None:
    """Put JSON in the place of a file in one stroke, which is on the disk when this returns."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as text:
        json.dump(value, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    os.replace(aside, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
