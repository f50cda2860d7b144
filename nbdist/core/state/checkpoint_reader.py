"""The checkpoint reader: whole tensors from the shards that ranks saved, in a snapshot or a checkpoint on disk."""

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
from nbdist.core.params.weight_copies import COPIES
from nbdist.core.state.checkpoint_format import FORMATS, RANK, cut_of, fits, optional_of, upgraded
from nbdist.core.state.checksum_files import checksum
from nbdist.core.state.extra_states import merged
from nbdist.core.state.replica import with_lost_ranks
from nbdist.core.state.shard_plan import buffer_entry, key_of
from nbdist.core.state.snapshot import newest, read
from nbdist.errors import PlanError

__all__ = ["MANIFEST", "NEWEST", "CheckpointReader", "candidates", "checkpoints", "sealed"]

MANIFEST = "checkpoint.json"
"""In a checkpoint's folder: its files and their checksums."""
NEWEST = "newest.json"
"""In a folder of checkpoints: the names of the published ones, the newest last."""
_TEXT = "nbdist"


class _Part(Protocol):
    """A file or snapshot buffer with shards of one rank."""

    text: str

    @property
    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> list[int]: ...

    def read(self, key: str) -> torch.Tensor: ...


class CheckpointReader:
    """Reads whole tensors from the shards that all ranks saved.

    Args:
        name: Its name in errors.
        parts: The shards of each rank.
        of_replica: Whether they may be those of a replica only.

    Attributes:
        ranks: Each rank's metadata, see `RANK`: `position` (its progress), `schedulers`, `reports_loss`, `mesh` etc.
        tensors: Shape, dtype and split of the model's tensors, by name.
        made: Of these the buffers that a forward has made, or given another shape.
        optimizers: Of each optimizer by name, the settings of its `groups`, with parameters by name, and its own
            `attributes`.
        values: Optimizer state that is not a tensor, by parameter.
        left_out: The sum of the bits of each frozen parameter that is not in it, by name.
        copies_state: A `WeightCopies.state_dict`; empty if none was saved.
        complete: Whether all of the model must be in it; a snapshot leaves out what never changes.
        seal: The checksum over a checkpoint's checksums: checkpoints with the same one are identical.
    """

    complete = False
    seal = ""

    def __init__(self, name: str, parts: Sequence[_Part], *, of_replica: bool = False) -> None:
        self.name = name
        self._checksums: dict[Path, str] = {}
        try:
            ranks = [upgraded(json.loads(part.text)) for part in parts if part.text]
        except (ValueError, RecursionError):
            ranks = []
        if not (ranks and fits(ranks, [RANK])):
            raise self._malformed("the metadata of a rank")
        ranks = sorted(ranks, key=lambda rank: int(rank["rank"]))
        if of_replica and len(ranks) < ranks[0].get("replica", {}).get("ranks", 0):
            ranks = with_lost_ranks(ranks)
        self.ranks: list[dict[str, Any]] = ranks
        if [rank["rank"] for rank in self.ranks] != list(range(len(ranks))):
            raise self._malformed("the list of ranks")
        first = self.ranks[0]
        try:
            self._optional = optional_of(self.ranks)
        except ValueError as error:
            raise self._malformed(str(error)) from None
        made = reversed(self._optional["made"])
        self.made: dict[str, dict[str, Any]] = {name: about for each in made for name, about in each.items()}
        self.left_out: dict[str, int] = {}
        parts_left = {key: total for each in self._optional["left_out"] for key, total in each.items()}
        for key, total in parts_left.items():
            of = key.rsplit("|", 4)[0]
            self.left_out[of] = (self.left_out.get(of, 0) + total) % 2**64
        self.copies_state: dict[str, Any] = first.get("copies", {})
        self.tensors: dict[str, dict[str, Any]] = {**first["tensors"], **self.made}
        self.optimizers: dict[str, dict[str, Any]] = first["optimizers"]
        self.values: dict[str, dict[str, Any]] = {
            name: value for rank in reversed(self.ranks) for name, value in rank["values"].items()
        }
        try:
            self._cuts = {name: cut_of(about) for name, about in self.tensors.items()}
        except ValueError:
            raise self._malformed("the description of the tensors") from None
        self._part_of: dict[str, _Part] = {}
        self._entries: dict[str, dict[str, bool]] = {}
        self._copies: dict[str, dict[str, bool]] = {}
        for part in parts:
            for key in part.keys:
                of, entry, kind, *_ = key.rsplit("|", 4) if key.count("|") >= 4 else ("",) * 4
                if of not in self.tensors:
                    raise self._malformed(f"the tensor {key!r}")
                self._part_of.setdefault(key, part)
                entries = self._copies if entry in COPIES else self._entries
                entries.setdefault(of, {})[entry] = kind == "part"
        for of, copied in [*self._entries.items(), *self._copies.items()]:
            for entry in copied:
                self._check(of, entry)

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.ranks[0]["position"]["step"])

    @classmethod
    def of_snapshot(cls, paths: Sequence[Sequence[str]]) -> CheckpointReader | None:
        """The newest whole snapshot; None without one.

        Args:
            paths: Each rank's snapshot buffers, see `SnapshotStore`.
        """
        found = newest(paths)
        return None if found is None else cls("the last snapshot", read(found[1]), of_replica=True)

    @classmethod
    def in_folder(cls, folder: str, *, hashed: bool = True) -> CheckpointReader:
        """The checkpoint in a folder; of several the newest undamaged one, with a warning if newer ones are damaged.

        Args:
            folder: Of checkpoints, or of one.
            hashed: Whether to check every byte; else only lengths and headers, which is fast.

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
        """One checkpoint, by its folder; checks its files' lengths and headers.

        Raises:
            PlanError: It is damaged, or of another format.
        """
        about = _read_sealed(place / MANIFEST, FORMATS)
        files = _files(place, about)
        saved = cls(f"checkpoint {str(place)!r}", [_File(place / name) for name in files])
        saved.complete, saved.seal = True, about["checksum"]
        saved._checksums = {place / name: expected for name, (_, expected) in files.items()}
        return saved

    def hash_files(self, reader: int = 0, readers: int = 1) -> None:
        """Check files of a checkpoint against their checksums, every byte. Local.

        Args:
            reader: Index of this process among those that share the work.
            readers: How many share it.

        Raises:
            PlanError: A file was changed.
        """
        by_size = sorted(self._checksums, key=lambda file: -file.stat().st_size)
        for file in by_size[reader::readers]:
            if checksum(file) != self._checksums[file]:
                raise _incomplete(file.parent, f"{file.name} was changed")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor of the model was saved."""
        dtype: torch.dtype = getattr(torch, self.tensors[name]["dtype"])
        return dtype

    def entries(self, name: str) -> list[str]:
        """The tensor entries of a parameter's optimizer state."""
        return [entry for entry in self._entries.get(name, {}) if entry]

    @property
    def names(self) -> set[str]:
        """The model's tensors that were saved; a snapshot leaves out what never changes."""
        return set(self._entries)

    def holds(self, name: str) -> bool:
        """Whether the values of a parameter were saved."""
        return "" in self._entries.get(name, {}) or name in self.left_out

    def whole(self, name: str, entry: str = "") -> torch.Tensor:
        """A whole tensor of the model, or entry of its optimizer state; it may share memory with the file or buffer."""
        about = self.tensors[name]
        if not self._is_split(name, entry):
            return self._read(key_of(name, entry, None, None))
        cut, local = self._local(name)
        pieces = []
        for tp in range(about["tp"]):
            parts = [self._read(key_of(name, entry, tp, shard)) for shard in range(about["shard"])]
            flat = parts[0] if about["shard"] == 1 else torch.cat(parts)[: local.numel()]
            pieces.append(flat.view(local))
        return pieces[0] if cut is None else cut.join(pieces)

    def copies(self, entry: str) -> list[str]:
        """The parameters and buffers of which a copy was saved, see `WeightCopies`."""
        return [name for name, entries in self._copies.items() if entry in entries]

    def _is_split(self, name: str, entry: str) -> bool:
        return (self._copies if entry in COPIES else self._entries)[name][entry]

    def _local(self, name: str) -> tuple[Cut | None, torch.Size]:
        """How a tensor was split over ``tp``, and the shape of a part."""
        about = self.tensors[name]
        cut, shape = self._cuts[name], list(about["shape"])
        if cut is not None:
            shape[cut.dim] //= about["tp"]
        return cut, torch.Size(shape)

    def _check(self, name: str, entry: str) -> None:
        """Check that all parts of an entry exist and fit together."""
        about = self.tensors[name]
        try:
            if not self._is_split(name, entry):
                key = key_of(name, entry, None, None)
                whole = self._part_of[key].shape(key)
                fits_shape = whole == about["shape"] or (entry and not entry.startswith(buffer_entry(1)[0]))
            else:
                _, local = self._local(name)
                shape = [*local] if about["shard"] == 1 else [-(-local.numel() // about["shard"])]
                keys = (key_of(name, entry, tp, shard) for tp in range(about["tp"]) for shard in range(about["shard"]))
                fits_shape = all(self._part_of[key].shape(key) == shape for key in keys)
        except (ValueError, KeyError):
            fits_shape = False
        if not fits_shape:
            raise self._malformed(f"{entry} of {name}" if entry else name)

    def _malformed(self, what: str) -> PlanError:
        return PlanError(f"{self.name} was not written by nbdist: {what} is malformed.")

    def buffer(self, name: str, data_rank: int | None = None) -> torch.Tensor:
        """A buffer: that of one rank, or else the mean over ranks, as in `ParamTable.average_buffers_`."""
        first = self.whole(name, "" if "" in self._entries[name] else next(iter(self._entries[name])))
        if data_rank is not None:
            own = buffer_entry(data_rank)
            return self.whole(name, own) if own in self._entries[name] else first
        others = [self.whole(name, entry) for entry in self._entries[name] if entry]
        if not (others and first.is_floating_point()):
            return first
        differences = torch.zeros_like(first)
        for other in others:
            differences += torch.where(other == first, 0.0, other - first)
        return first + differences / (1 + len(others))

    def extra_states(self, data_rank: int | None = None) -> dict[str, Any]:
        """The extra states of modules by name: those of one rank's replica, or else of the first one.

        Raises:
            PlanError: They are malformed.
        """
        saved = self._optional["extra_state"]
        try:
            return merged(saved, data_rank or 0)
        except (ValueError, KeyError):
            raise self._malformed("the extra state of a module") from None

    @property
    def carried_states(self) -> list[dict[str, Any]]:
        """What each rank has saved of its `CarriedState`."""
        return self._optional["carried"]

    def _read(self, key: str) -> torch.Tensor:
        return self._part_of[key].read(key)


class _File:
    """A safetensors file, opened at the first read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        try:
            with safe_open(path, framework="pt") as file:
                self.text: str = (file.metadata() or {}).get(_TEXT, "")
                self._shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _incomplete(path.parent, f"{path.name} cannot be read ({error})") from None

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
        except (SafetensorError, OSError) as error:  # for example, another run has removed it
            raise _incomplete(self._path.parent, f"{self._path.name} cannot be read ({error})") from None
        return tensor


def candidates(folder: str) -> list[Path]:
    """The checkpoints in a folder, the newest first; the folder itself if it is one.

    Raises:
        PlanError: There is none.
    """
    path = Path(folder)
    if os.path.isfile(path / MANIFEST):
        return [path]
    places = [path / name for name in reversed(checkpoints(path))]
    if not places:
        raise PlanError(f"{folder!r} holds no checkpoint (no {NEWEST} in it): give the folder that was written to.")
    return places


def checkpoints(path: Path) -> list[str]:
    """The names of the published checkpoints in a folder, the newest last.

    Raises:
        PlanError: `newest.json` was changed.
    """
    if not os.path.isfile(path / NEWEST):
        return []
    names = _read_sealed(path / NEWEST).get("checkpoints")
    if fits(names, [str]) and names and all(map(_is_file_name, names)):
        return list(names)
    raise PlanError(f"{NEWEST} in {str(path)!r} was not written by nbdist: name one of the folders beside it.")


def _files(place: Path, about: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The length and checksum of each file of a checkpoint; checks that all exist."""
    files = about.get("files")
    if not (fits(files, {str: (int, str)}) and files and all(map(_is_file_name, files))):
        raise PlanError(f"{MANIFEST} in {str(place)!r} was not written by nbdist: give the folder that was written to.")
    for name, (nbytes, _) in files.items():
        if not os.path.isfile(place / name):
            raise _incomplete(place, f"{name} is not there")
        if os.path.getsize(place / name) != nbytes:
            raise _incomplete(place, f"{name} was cut or is longer")
    return dict(files)


def _incomplete(place: Path, what: str) -> PlanError:
    return PlanError(f"checkpoint {str(place)!r} is not whole, {what}: copy all of its files again.")


def sealed(content: dict[str, Any]) -> str:
    """JSON with a checksum of itself."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "checksum": digest}, indent=1)


def _read_sealed(path: Path, formats: Sequence[int] = ()) -> dict[str, Any]:
    """The content of a `sealed` file, if not one character was changed."""
    try:
        text = path.read_text(encoding="utf-8") if os.path.isfile(path) else ""
        content = json.loads(text)
        if formats and content["format"] not in formats:
            known = " and ".join(map(str, formats))
            raise PlanError(
                f"checkpoint {str(path.parent)!r} has format {content['format']}: this nbdist reads formats {known}."
            )
        if text == sealed({key: value for key, value in content.items() if key != "checksum"}):
            return dict(content)
    except PlanError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise PlanError(
        f"{path.name} in {str(path.parent)!r} was not written by nbdist, or was changed: copy all files again."
    )


def _is_file_name(name: str) -> bool:
    """Whether a name is that of something in the same folder."""
    return Path(name).name == name != ".."
