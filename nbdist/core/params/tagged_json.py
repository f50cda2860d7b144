"""Tagged JSON: values of Python, and tensors, as JSON that says their types; unlike a pickle, reading runs no code."""

from __future__ import annotations

import base64
import collections
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nbdist.errors import TaskError

__all__ = ["from_json", "to_json"]

_TAG = "|type"
_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, Any] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "size": torch.Size,
}  # fmt: skip
_BYTES: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "bytearray": bytearray, "file": io.BytesIO}
_MAPPINGS: dict[str, Any] = {"dict": dict, "ordered": collections.OrderedDict}
_TAGS = {kind: tag for kinds in (_SEQUENCES, _MAPPINGS) for tag, kind in kinds.items()}


def to_json(value: Any, what: str) -> Any:
    """A value as JSON-able data. Waits for the device of its tensors.

    Args:
        value: Numbers, strings, bytes, tensors, arrays, and lists, tuples, sets and dicts of them.
        what: Its name in errors.

    Raises:
        TaskError: It is of another type.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [to_json(item, what) for item in value]
    if kind is dict and all(type(key) is str for key in value) and _TAG not in value:
        return {key: to_json(item, f"{what}[{key!r}]") for key, item in value.items()}
    if kind in _MAPPINGS.values():
        return {_TAG: _TAGS[kind], "items": [[to_json(one, what) for one in item] for item in value.items()]}
    if kind in _TAGS:
        limit = {"maxlen": value.maxlen} if kind is collections.deque else {}
        return {_TAG: _TAGS[kind], "items": [to_json(item, what) for item in value], **limit}
    if kind is io.BytesIO:
        return {_TAG: "file", "data": _text(value.getvalue())}
    if kind in (bytes, bytearray):
        return {_TAG: kind.__name__, "data": _text(bytes(value))}
    if kind is complex:
        return {_TAG: "complex", "items": [value.real, value.imag]}
    if kind in (torch.dtype, torch.device):
        return {_TAG: kind.__name__, "name": str(value).removeprefix("torch.")}
    if kind is torch.Tensor and value.layout is torch.strided and not (value.is_quantized or value.is_meta):
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(plain.dtype).removeprefix("torch.")
        on = {} if value.device.type == "cpu" else {"on": value.device.type}
        return {_TAG: "tensor", "dtype": dtype, "shape": list(plain.shape), "data": _text(content), **on}
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufc":
        scalar = kind is not np.ndarray
        content = np.ascontiguousarray(value).tobytes()
        return {
            _TAG: "array", "dtype": value.dtype.str, "shape": list(value.shape), "data": _text(content),
            "scalar": scalar,
        }  # fmt: skip
    raise TaskError(
        f"{what} is a {kind.__name__}, which a checkpoint cannot hold, as reading it must run no code: take numbers, "
        "strings, bytes, tensors, and lists, tuples, sets and dicts of them."
    )


def from_json(value: Any, device: torch.device | None = None) -> Any:
    """The value of `to_json`.

    Args:
        value: What it made.
        device: Of those tensors that were not on the CPU; by default they are there now.

    Raises:
        ValueError: Nothing that `to_json` has made.
    """
    if isinstance(value, list):
        return [from_json(item, device) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: from_json(item, device) for key, item in value.items()}
    try:
        return _tagged(value[_TAG], value, device)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"malformed {value.get(_TAG)!r}") from error


def _tagged(tag: str, value: dict[str, Any], device: torch.device | None) -> Any:
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]((from_json(key, device), from_json(item, device)) for key, item in value["items"])
    if tag == "deque":
        return collections.deque(from_json(value["items"], device), value["maxlen"])
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](from_json(value["items"], device))
    if tag in _BYTES:
        return _BYTES[tag](_bytes(value["data"]))
    if tag == "complex":
        return complex(*value["items"])
    if tag == "device":
        return torch.device(value["name"])
    if tag == "dtype":
        return _dtype(value["name"])
    if tag == "tensor":
        flat = torch.frombuffer(bytearray(_bytes(value["data"])) or bytearray(1), dtype=torch.uint8)
        dtype = _dtype(value["dtype"])
        nbytes = len(_bytes(value["data"]))
        made = flat[:nbytes].view(dtype).reshape(value["shape"]) if nbytes else torch.empty(value["shape"], dtype=dtype)
        return made.to(device) if device is not None and "on" in value else made
    if tag == "array":
        made = np.frombuffer(_bytes(value["data"]), np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        return made[()] if value["scalar"] else made
    raise ValueError(f"unknown type {tag!r}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
