"""Tensor buffers: tensors and a text as one block of bytes, in memory laid out as a safetensors file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch

from nbdist.errors import TaskError

__all__ = ["TensorBuffer", "TensorLayout"]

_LENGTH = struct.Struct("<Q")
_TEXT = "nbdist"
_HEADER_STEP = 4096  # the header is padded to a multiple, so that the data behind it rarely moves when the text grows
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
_DTYPE_OF = {word: dtype for dtype, word in _DTYPES.items()}


class TensorLayout:
    """Where tensors lie in a tensor buffer.

    Args:
        tensors: By key; only shapes and dtypes are used.

    Attributes:
        places: Offset behind the header and length of each tensor, in bytes.
        data_bytes: Bytes of all tensors.

    Raises:
        TaskError: A dtype cannot be saved.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.signature = _signature(tensors)
        self.places: dict[str, tuple[int, int]] = {}
        entries, start = [], 0
        for key in sorted(tensors, key=lambda key: -tensors[key].itemsize):  # largest first: so each one is aligned
            tensor = tensors[key]
            if tensor.dtype not in _DTYPES:
                raise TaskError(f"{key.partition('|')[0]} is of {tensor.dtype}, which cannot be saved.")
            self.places[key] = (start, tensor.nbytes)
            end = start + tensor.nbytes
            about = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            entries.append(f"{json.dumps(key)}:{json.dumps(about)}")
            start = end
        self.data_bytes = start
        self._entries = ",".join(entries)

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether `tensors` have these keys, shapes and dtypes."""
        return self.signature == _signature(tensors)

    def header(self, text: str) -> bytes:
        """The safetensors header, with `text` in its metadata."""
        entries = f",{self._entries}" if self._entries else ""
        content = f'{{"__metadata__":{{"{_TEXT}":{json.dumps(text)}}}{entries}}}'.encode()
        padded = -(-(len(content) + _LENGTH.size) // _HEADER_STEP) * _HEADER_STEP - _LENGTH.size
        return _LENGTH.pack(padded) + content.ljust(padded)


class TensorBuffer:
    """Reads tensors from memory without a copy.

    Args:
        memory: ``(bytes,)`` of uint8.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        (length,) = _LENGTH.unpack(memory[: _LENGTH.size].numpy().tobytes())
        self._data = memory[_LENGTH.size + length :]
        self._entries: dict[str, dict[str, Any]] = json.loads(
            memory[_LENGTH.size : _LENGTH.size + length].numpy().tobytes()
        )
        self.text: str = self._entries.pop("__metadata__")[_TEXT]

    @property
    def keys(self) -> list[str]:
        """The tensors' keys."""
        return list(self._entries)

    def shape(self, key: str) -> list[int]:
        """The shape of a tensor."""
        shape: list[int] = self._entries[key]["shape"]
        return shape

    def read(self, key: str) -> torch.Tensor:
        """A tensor, as a view of the memory."""
        about = self._entries[key]
        start, end = about["data_offsets"]
        return self._data[start:end].view(_DTYPE_OF[about["dtype"]]).view(about["shape"])


def _signature(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]
