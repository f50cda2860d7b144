"""Where the tensors of safetensors files lie, by name: their headers say it, and nothing else is read."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from nbdist.core.transfer.file_memory import Extent, map_extent
from nbdist.core.transfer.segment_path import segment_path
from nbdist.errors import TaskError

__all__ = ["StoredTensor", "stored_tensors"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        extent: Its place there.
        dtype: Its dtype.
        shape: Its shape.
    """

    extent: Extent
    dtype: torch.dtype
    shape: torch.Size

    def mapped(self) -> torch.Tensor:
        """The tensor, mapped from the file; nothing may write to it, as it is sent as a place in the file. Local."""
        return map_extent(self.extent, unchanged=True).view(self.dtype).view(self.shape)


def stored_tensors(path: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of all in a folder, by name. Local.

    Raises:
        TaskError: There is no such file, or it is none.
    """
    place = Path(path).expanduser().absolute()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        what = "holds no safetensors file" if place.is_dir() else "does not exist"
        raise TaskError(f"weights={path} {what}: give a .safetensors file, or the folder of several.")
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in found:
                raise TaskError(f"weights={path} has {name} in more than one file: leave one of them there.")
            found[name] = tensor
    return found


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            where = segment_path(stream.fileno(), str(file))
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            if length > min(size, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = _LENGTH.size + length
        return {name: _stored(where, start, size, **entry) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, struct.error) as error:
        raise TaskError(f"{file} is no safetensors file that can be read ({error}).") from error


def _stored(where: str, start: int, size: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    begin, end = data_offsets
    kind = _DTYPES[dtype]
    if not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError("an entry of its header is not within the file: was the download cut off?")
    return StoredTensor(extent=Extent(where, start + begin, end - begin), dtype=kind, shape=torch.Size(shape))
