"""A state that was kept, in memory or on disk: which tensors there are, and each of them as a whole."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nbdist.core.image import Image
from nbdist.core.pieces import key_of, own_entry
from nbdist.core.placement import Cut
from nbdist.errors import PlanError

__all__ = ["ABOUT", "FORMAT", "NEWEST", "Saved", "checksum", "is_whole"]

ABOUT = "checkpoint.json"
"""In the folder of one checkpoint: its files and their checksums."""
NEWEST = "newest.json"
"""In a folder of checkpoints: their names, the newest one last."""
FORMAT = 2
_TEXT = "nbdist"
_BLOCK_BYTES = 1 << 20


class _Part(Protocol):
    """What one rank has kept, or a part of it."""

    text: str

    @property
    def keys(self) -> list[str]: ...

    def read(self, key: str) -> torch.Tensor: ...


class Saved:
    """Reads whole tensors out of what the ranks of a training have kept.

    Args:
        name: What it is called in errors.
        parts: What each rank has kept.

    Attributes:
        ranks: What each rank said: `position`, `scheduler`, `scale`, `speaks`, and what it trained on.
        tensors: What is known of the model's tensors, by name.
        groups: The settings of the optimizer's groups, their parameters by name.
        values: The entries of its state that are no tensors, by parameter.
    """

    def __init__(self, name: str, parts: Sequence[_Part]) -> None:
        self.name = name
        told = [json.loads(part.text) for part in parts if part.text]
        self.ranks: list[dict[str, Any]] = sorted(told, key=lambda rank: int(rank["rank"]))
        first = self.ranks[0]
        self.tensors: dict[str, dict[str, Any]] = first["tensors"]
        self.groups: list[dict[str, Any]] = first["groups"]
        self.values: dict[str, dict[str, Any]] = {
            name: value for rank in reversed(self.ranks) for name, value in rank["values"].items()
        }
        self._part_of: dict[str, _Part] = {}
        self._entries: dict[str, dict[str, bool]] = {}
        for part in parts:
            for key in part.keys:
                self._part_of.setdefault(key, part)
                of, entry, kind, *_ = key.rsplit("|", 4)
                self._entries.setdefault(of, {})[entry] = kind == "part"

    @classmethod
    def in_memory(cls, images: Sequence[Image]) -> Saved:
        """The snapshot in these images."""
        return cls("the last snapshot", images)

    @classmethod
    def in_folder(cls, folder: str) -> Saved:
        """The checkpoint in a folder; of several the newest that is whole, with a warning if that is an older one.

        Raises:
            PlanError: There is none that this version reads.
        """
        path = Path(folder)
        if (path / ABOUT).is_file():
            return cls._of(path)
        names = list(reversed(checkpoints(path)))
        if not names:
            raise PlanError(f"{folder!r} holds no checkpoint (no {NEWEST} in it): give the folder that was written to.")
        for name in names:
            try:
                saved = cls._of(path / name)
            except PlanError as error:
                if name == names[-1]:
                    raise
                warnings.warn(f"{error} The one before it is taken.", stacklevel=3)
                continue
            return saved
        raise AssertionError

    @classmethod
    def _of(cls, path: Path) -> Saved:
        files = is_whole(path)
        return cls(repr(str(path)), [_File(path / file) for file in files])

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

    def whole(self, name: str, entry: str = "") -> torch.Tensor:
        """A tensor of the model, or an entry of the optimizer's state of it, as a whole; maybe in memory of others."""
        about = self.tensors[name]
        if not self._entries[name][entry]:
            return self._read(key_of(name, entry, None, None))
        shape = list(about["shape"])
        if about["cut"] is not None:
            shape[about["cut"]["dim"]] //= about["tp"]
        local = torch.Size(shape)
        pieces = []
        for tp in range(about["tp"]):
            parts = [self._read(key_of(name, entry, tp, shard)) for shard in range(about["shard"])]
            flat = parts[0] if about["shard"] == 1 else torch.cat(parts)[: local.numel()]
            pieces.append(flat.view(local))
        if about["cut"] is None:
            return pieces[0]
        return Cut(dim=about["cut"]["dim"], sections=tuple(about["cut"]["sections"])).join(pieces)

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
                self._keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise PlanError(
                f"checkpoint {str(path.parent)!r} is not whole, {path.name} cannot be read ({error})."
            ) from None

    @property
    def keys(self) -> list[str]:
        return self._keys

    def read(self, key: str) -> torch.Tensor:
        if self._file is None:
            self._file = safe_open(self._path, framework="pt")
        tensor: torch.Tensor = self._file.get_tensor(key)
        return tensor


def checkpoints(path: Path) -> list[str]:
    """The names of the checkpoints in a folder, the newest one last."""
    try:
        names = json.loads((path / NEWEST).read_text())["checkpoints"]
        if all(isinstance(name, str) and Path(name).name == name for name in names):
            return list(names)
    except OSError:
        return []
    except (ValueError, TypeError, KeyError):
        pass
    raise PlanError(f"{NEWEST} in {str(path)!r} is none that nbdist wrote: name one of the folders beside it.")


def is_whole(path: Path) -> list[str]:
    """The files of the checkpoint in a folder, of which each byte is as it was written.

    Raises:
        PlanError: It is not whole, or no checkpoint that this version reads.
    """
    try:
        about = json.loads((path / ABOUT).read_text())
        written = about["format"]
    except (OSError, ValueError, TypeError, KeyError):
        raise PlanError(
            f"{ABOUT} in {str(path)!r} is none that nbdist wrote: give the folder that was written to."
        ) from None
    if written != FORMAT:
        raise PlanError(f"checkpoint {str(path)!r} has format {written}: this nbdist reads format {FORMAT}.")
    if about.get("checksum") != checksum_of_text(about):
        raise PlanError(f"checkpoint {str(path)!r} is not whole, {ABOUT} was changed: copy all of its files again.")
    for name, (nbytes, told) in about["files"].items():
        file = path / Path(name).name
        if not file.is_file() or file.stat().st_size != nbytes or checksum(file) != told:
            what = "was changed or cut" if file.is_file() else "is not there"
            raise PlanError(f"checkpoint {str(path)!r} is not whole, {name} {what}: copy all of its files again.")
    return [Path(name).name for name in about["files"]]


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def checksum_of_text(about: dict[str, Any]) -> str:
    """The SHA-256 of what `ABOUT` says beside it."""
    told = {key: value for key, value in about.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
