"""A state that was kept, in memory or on disk: which tensors there are, and each of them as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nbdist.core.params.placement import Cut
from nbdist.core.state.checked_files import checksum
from nbdist.core.state.checkpoint_format import RANK, cut_of, fits
from nbdist.core.state.shard_plan import key_of, own_entry
from nbdist.core.state.tensor_buffer import TensorBuffer
from nbdist.errors import PlanError

__all__ = ["ABOUT", "FORMAT", "NEWEST", "CheckpointReader", "candidates", "checkpoints", "sealed"]

ABOUT = "checkpoint.json"
"""In the folder of one checkpoint: its files and their checksums."""
NEWEST = "newest.json"
"""In a folder of checkpoints: their names, the newest one last."""
FORMAT = 2
_TEXT = "nbdist"


class _Part(Protocol):
    """What one rank has kept, or a part of it."""

    text: str

    @property
    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> list[int]: ...

    def read(self, key: str) -> torch.Tensor: ...


class CheckpointReader:
    """Reads whole tensors out of what the ranks of a training have kept.

    Args:
        name: What it is called in errors.
        parts: What each rank has kept.

    Attributes:
        ranks: What each rank said: `position`, `scheduler`, `scale`, `reports_loss`, and what it trained on.
        tensors: What is known of the model's tensors, by name.
        groups: The settings of the optimizer's groups, their parameters by name.
        attributes: What it keeps under names of its own; older checkpoints do not say.
        values: The entries of its state that are no tensors, by parameter.
        complete: Whether all of the model has to be in it; a snapshot leaves out what never changes.
        seal: Of a checkpoint, the checksum over all of its checksums: two that have the same one are the same.
    """

    complete = False
    seal = ""

    def __init__(self, name: str, parts: Sequence[_Part]) -> None:
        self.name = name
        self._checksums: dict[Path, str] = {}
        try:
            told = [json.loads(part.text) for part in parts if part.text]
        except (ValueError, RecursionError):
            told = []
        if not (told and fits(told, [RANK])):
            raise self._not_ours("a rank's account of itself")
        self.ranks: list[dict[str, Any]] = sorted(told, key=lambda rank: int(rank["rank"]))
        if [rank["rank"] for rank in self.ranks] != list(range(len(told))):
            raise self._not_ours("the ranks that wrote it")
        first = self.ranks[0]
        self.tensors: dict[str, dict[str, Any]] = first["tensors"]
        self.groups: list[dict[str, Any]] = first["groups"]
        self.attributes: dict[str, Any] = first.get("attributes", {})
        if not isinstance(self.attributes, dict):
            raise self._not_ours("what the optimizer keeps")
        self.values: dict[str, dict[str, Any]] = {
            name: value for rank in reversed(self.ranks) for name, value in rank["values"].items()
        }
        try:
            self._cuts = {name: cut_of(about) for name, about in self.tensors.items()}
        except ValueError:
            raise self._not_ours("what it says of the tensors") from None
        self._part_of: dict[str, _Part] = {}
        self._entries: dict[str, dict[str, bool]] = {}
        for part in parts:
            for key in part.keys:
                of, entry, kind, *_ = key.rsplit("|", 4) if key.count("|") >= 4 else ("",) * 4
                if of not in self.tensors:
                    raise self._not_ours(f"the tensor {key!r}")
                self._part_of.setdefault(key, part)
                self._entries.setdefault(of, {})[entry] = kind == "part"
        for of, entries in self._entries.items():
            for entry in entries:
                self._check(of, entry)

    @classmethod
    def in_memory(cls, images: Sequence[TensorBuffer]) -> CheckpointReader:
        """The snapshot in these images."""
        return cls("the last snapshot", images)

    @classmethod
    def in_folder(cls, folder: str, *, hashed: bool = True) -> CheckpointReader:
        """The checkpoint in a folder; of several the newest that is whole, with a warning if that is an older one.

        Args:
            folder: Of checkpoints, or of one.
            hashed: Whether to look at every byte; else at lengths and headers only, in no time.

        Raises:
            PlanError: There is none that this version reads.
        """
        places = candidates(folder)
        for place in places:
            try:
                saved = cls.of(place)
                if hashed:
                    saved.hash_files()
                return saved
            except PlanError as error:
                if place == places[-1]:
                    raise
                warnings.warn(f"{error} The one before it is taken.", stacklevel=3)
        raise AssertionError

    @classmethod
    def of(cls, place: Path) -> CheckpointReader:
        """One checkpoint, by its folder, whose files have the right lengths and headers.

        Raises:
            PlanError: It is not whole, or none that this version reads.
        """
        about = _opened(place / ABOUT, FORMAT)
        files = _files(place, about)
        saved = cls(repr(str(place)), [_File(place / name) for name in files])
        saved.complete, saved.seal = True, about["checksum"]
        saved._checksums = {place / name: told for name, (_, told) in files.items()}
        return saved

    def hash_files(self, reader: int = 0, readers: int = 1) -> None:
        """See that files of a checkpoint are what was written: every byte of each. Local.

        Args:
            reader: Which of those that share the work this is.
            readers: How many.

        Raises:
            PlanError: One is not.
        """
        by_size = sorted(self._checksums, key=lambda file: -file.stat().st_size)
        for file in by_size[reader::readers]:
            if checksum(file) != self._checksums[file]:
                raise _not_whole(file.parent, f"{file.name} was changed")

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor of the model was saved in."""
        dtype: torch.dtype = getattr(torch, self.tensors[name]["dtype"])
        return dtype

    def entries(self, name: str) -> list[str]:
        """The tensors of an optimizer's state of a parameter."""
        return [entry for entry in self._entries.get(name, {}) if entry]

    @property
    def names(self) -> set[str]:
        """The tensors of the model that were kept; a snapshot leaves out what never changes."""
        return set(self._entries)

    def holds(self, name: str) -> bool:
        """Whether the values of a parameter were kept."""
        return "" in self._entries.get(name, {})

    def whole(self, name: str, entry: str = "") -> torch.Tensor:
        """A tensor of the model, or an entry of the optimizer's state of it, as a whole; maybe in memory of others."""
        about = self.tensors[name]
        if not self._entries[name][entry]:
            return self._read(key_of(name, entry, None, None))
        cut, local = self._local(name)
        pieces = []
        for tp in range(about["tp"]):
            parts = [self._read(key_of(name, entry, tp, shard)) for shard in range(about["shard"])]
            flat = parts[0] if about["shard"] == 1 else torch.cat(parts)[: local.numel()]
            pieces.append(flat.view(local))
        return pieces[0] if cut is None else cut.join(pieces)

    def _local(self, name: str) -> tuple[Cut | None, torch.Size]:
        """How a tensor was split over ``tp``, and the shape of the parts."""
        about = self.tensors[name]
        cut, shape = self._cuts[name], list(about["shape"])
        if cut is not None:
            shape[cut.dim] //= about["tp"]
        return cut, torch.Size(shape)

    def _check(self, name: str, entry: str) -> None:
        """See that all parts are there of an entry, and fit together."""
        about = self.tensors[name]
        try:
            if not self._entries[name][entry]:
                key = key_of(name, entry, None, None)
                whole = self._part_of[key].shape(key)
                fitting = whole == about["shape"] or (entry and not entry.startswith(own_entry(1)[0]))
            else:
                _, local = self._local(name)
                shape = [*local] if about["shard"] == 1 else [-(-local.numel() // about["shard"])]
                keys = (key_of(name, entry, tp, shard) for tp in range(about["tp"]) for shard in range(about["shard"]))
                fitting = all(self._part_of[key].shape(key) == shape for key in keys)
        except (ValueError, KeyError):
            fitting = False
        if not fitting:
            raise self._not_ours(f"{entry} of {name}" if entry else name)

    def _not_ours(self, what: str) -> PlanError:
        return PlanError(f"checkpoint {self.name} is none that nbdist wrote: {what} is not as it writes it.")

    def buffer(self, name: str, data_rank: int | None = None) -> torch.Tensor:
        """A buffer: that of one rank, or else what all of them give, as `ParamTable.average_buffers_` does."""
        first = self.whole(name, "" if "" in self._entries[name] else next(iter(self._entries[name])))
        if data_rank is not None:
            own = own_entry(data_rank)
            return self.whole(name, own) if own in self._entries[name] else first
        others = [self.whole(name, entry) for entry in self._entries[name] if entry]
        if not (others and first.is_floating_point()):
            return first
        differences = torch.zeros_like(first)
        for other in others:
            differences += torch.where(other == first, 0.0, other - first)
        return first + differences / (1 + len(others))

    def _read(self, key: str) -> torch.Tensor:
        return self._part_of[key].read(key)


class _File:
    """A safetensors file; opened when something is read from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        try:
            with safe_open(path, framework="pt") as file:
                self.text: str = (file.metadata() or {}).get(_TEXT, "")
                self._shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _not_whole(path.parent, f"{path.name} cannot be read ({error})") from None

    @property
    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key: str) -> list[int]:
        return self._shapes[key]

    def read(self, key: str) -> torch.Tensor:
        try:
            if self._file is None:
                self._file = safe_open(self._path, framework="pt")
            tensor: torch.Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:  # another run has removed it meanwhile, say
            raise _not_whole(self._path.parent, f"{self._path.name} cannot be read ({error})") from None
        return tensor


def candidates(folder: str) -> list[Path]:
    """The checkpoints that a folder stands for, the newest first: those in it, or it alone if it is one.

    Raises:
        PlanError: There is none.
    """
    path = Path(folder)
    if os.path.isfile(path / ABOUT):
        return [path]
    places = [path / name for name in reversed(checkpoints(path))]
    if not places:
        raise PlanError(f"{folder!r} holds no checkpoint (no {NEWEST} in it): give the folder that was written to.")
    return places


def checkpoints(path: Path) -> list[str]:
    """The names of the checkpoints in a folder, the newest one last.

    Raises:
        PlanError: Who keeps account of them was changed.
    """
    if not os.path.isfile(path / NEWEST):
        return []
    names = _opened(path / NEWEST).get("checkpoints")
    if fits(names, [str]) and names and all(map(_lies_in_it, names)):
        return list(names)
    raise PlanError(f"{NEWEST} in {str(path)!r} is none that nbdist wrote: name one of the folders beside it.")


def _files(place: Path, about: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The files of a checkpoint, all of which are there: the length and the checksum of each."""
    files = about.get("files")
    if not (fits(files, {str: (int, str)}) and files and all(map(_lies_in_it, files))):
        raise PlanError(f"{ABOUT} in {str(place)!r} is none that nbdist wrote: give the folder that was written to.")
    for name, (nbytes, _) in files.items():
        if not os.path.isfile(place / name):
            raise _not_whole(place, f"{name} is not there")
        if os.path.getsize(place / name) != nbytes:
            raise _not_whole(place, f"{name} was cut or is longer")
    return dict(files)


def _not_whole(place: Path, what: str) -> PlanError:
    return PlanError(f"checkpoint {str(place)!r} is not whole, {what}: copy all of its files again.")


def sealed(told: dict[str, Any]) -> str:
    """JSON with a checksum of itself."""
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return json.dumps({**told, "checksum": digest}, indent=1)


def _opened(path: Path, expected: int | None = None) -> dict[str, Any]:
    """What was `sealed` in a file, which has not one character changed."""
    try:
        text = path.read_text(encoding="utf-8") if os.path.isfile(path) else ""
        told = json.loads(text)
        if expected is not None and told["format"] != expected:
            raise PlanError(
                f"checkpoint {str(path.parent)!r} has format {told['format']}: this nbdist reads format {expected}."
            )
        if text == sealed({key: value for key, value in told.items() if key != "checksum"}):
            return dict(told)
    except PlanError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise PlanError(
        f"{path.name} in {str(path.parent)!r} is none that nbdist wrote, or was changed: copy all files again."
    )


def _lies_in_it(name: str) -> bool:
    """Whether a name is that of something in the same folder."""
    return Path(name).name == name != ".."
