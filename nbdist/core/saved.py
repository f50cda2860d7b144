"""A checkpoint as it lies in its folder: which tensors there are, and each of them as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from nbdist.core.placement import Cut
from nbdist.errors import PlanError

__all__ = ["INDEX", "Saved"]

INDEX = "checkpoint.json"


class Saved:
    """Reads whole tensors out of a checkpoint.

    Args:
        folder: Where it lies.

    Attributes:
        tensors: What is known of the model's tensors, by name.
        groups: The settings of the optimizer's groups, their parameters by name.
        values: The entries of its state that are no tensors, by parameter.

    Raises:
        PlanError: There is none that this version reads.
    """

    FORMAT: ClassVar[int] = 1

    def __init__(self, folder: str) -> None:
        self.folder = folder
        path = Path(folder)
        if not (path / INDEX).is_file():
            raise PlanError(f"{folder!r} holds no checkpoint (no {INDEX} in it): give the folder that save named.")
        try:
            index = json.loads((path / INDEX).read_text())
            written = index["format"]
        except (ValueError, TypeError, KeyError):
            raise PlanError(
                f"{INDEX} in {folder!r} is none that nbdist wrote: give the folder that save named."
            ) from None
        if written != self.FORMAT:
            raise PlanError(f"checkpoint {folder!r} has format {written}: this nbdist reads format {self.FORMAT}.")
        self.tensors: dict[str, dict[str, Any]] = index["tensors"]
        self.groups: list[dict[str, Any]] = index["groups"]
        self.values: dict[str, dict[str, Any]] = index["values"]
        self._files: dict[str, str] = index["files"]
        self._open: dict[str, Any] = {}
        self._entries: dict[str, dict[str, bool]] = {}
        for key in self._files:
            name, entry, kind, *_ = key.rsplit("|", 4)
            self._entries.setdefault(name, {})[entry] = kind == "part"
        missing = [name for name in dict.fromkeys(self._files.values()) if not (path / name).is_file()]
        if missing:
            raise PlanError(f"checkpoint {folder!r} is not whole, {missing[0]} is not there: copy all of its files.")

    @staticmethod
    def key(name: str, entry: str, tp: int | None, shard: int | None) -> str:
        """What a piece is called in a file: of which tensor, of which entry of its optimizer state, and which part.

        Args:
            name: The parameter or buffer.
            entry: The entry, or empty for the tensor itself.
            tp: The coordinate on ``tp`` where the tensor is cut over it.
            shard: The same for ``shard``.
        """
        kind = "whole" if tp is None and shard is None else "part"
        return f"{name}|{entry}|{kind}|{tp or 0}|{shard or 0}"

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor of the model was saved in."""
        dtype: torch.dtype = getattr(torch, self.tensors[name]["dtype"])
        return dtype

    def entries(self, name: str) -> list[str]:
        """The tensors of an optimizer's state of a parameter."""
        return [entry for entry in self._entries[name] if entry]

    def whole(self, name: str, entry: str = "") -> torch.Tensor:
        """A tensor of the model, or an entry of the optimizer's state of it, as a whole; maybe the file's memory."""
        about = self.tensors[name]
        if not self._entries[name][entry]:
            return self._read(self.key(name, entry, None, None))
        shape = list(about["shape"])
        if about["cut"] is not None:
            shape[about["cut"]["dim"]] //= about["tp"]
        local = torch.Size(shape)
        pieces = []
        for tp in range(about["tp"]):
            parts = [self._read(self.key(name, entry, tp, shard)) for shard in range(about["shard"])]
            flat = parts[0] if about["shard"] == 1 else torch.cat(parts)[: local.numel()]
            pieces.append(flat.view(local))
        if about["cut"] is None:
            return pieces[0]
        return Cut(dim=about["cut"]["dim"], sections=tuple(about["cut"]["sections"])).join(pieces)

    def _read(self, key: str) -> torch.Tensor:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = safe_open(Path(self.folder, file), framework="pt")
        tensor: torch.Tensor = self._open[file].get_tensor(key)
        return tensor
