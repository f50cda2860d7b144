"""torch's global settings: read in one process, set in another."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["read_settings", "set_settings"]

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _backend(path: str) -> _Setting:
    """A setting that is an attribute below ``torch.backends``."""
    *parents, name = path.split(".")

    def place() -> Any:
        return functools.reduce(getattr, parents, torch.backends)

    return lambda: getattr(place(), name), lambda value: setattr(place(), name, value)


def _attention(kind: str) -> _Setting:
    cuda: Any = torch.backends.cuda
    return getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp")


def _flushes_denormal() -> bool:
    """Whether the processor takes denormal numbers for zero, in this thread: Python computes with the same unit."""
    return sys.float_info.min / 2 * _one == 0.0


_one = 1.0
_BACKENDS = (
    "cudnn.enabled", "cudnn.benchmark", "cudnn.benchmark_limit", "cudnn.deterministic",
    "cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision", "cudnn.rnn.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction", "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
    "mkldnn.enabled", "mkldnn.deterministic",
    "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision", "mkldnn.rnn.fp32_precision",
)  # fmt: skip
_OLD_PRECISIONS = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32")  # before torch 2.9; those that mix both raise
_KINDS = ("flash", "mem_efficient", "math", "cudnn")


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _settings() -> dict[str, _Setting]:
    fill: Any = torch.utils.deterministic
    cuda: Any = torch.backends.cuda
    found: dict[str, _Setting] = {
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "deterministic": (_deterministic, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
        "fill uninitialized": (
            lambda: fill.fill_uninitialized_memory,
            functools.partial(setattr, fill, "fill_uninitialized_memory"),
        ),
        # Before the precisions of each backend, some of which it sets too.
        "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "anomaly": (
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda both: torch.autograd.set_detect_anomaly(*both),
        ),
        "flush denormal": (_flushes_denormal, torch.set_flush_denormal),
        "fast path": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        "half precision attention": (
            cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp,
        ),
    }  # fmt: skip
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    for path in (*_BACKENDS, *(() if new else _OLD_PRECISIONS)):
        try:
            getter, setter = _backend(path)
            getter()
        except (AttributeError, RuntimeError):  # of another version of torch
            continue
        found[path] = getter, setter
    return found | {f"{kind} attention": _attention(kind) for kind in _KINDS if hasattr(cuda, f"enable_{kind}_sdp")}


@functools.cache
def _known() -> dict[str, _Setting]:
    return _settings()


def read_settings() -> dict[str, Any]:
    """The settings of this process that are none of a thread or a device, by name. Local, 10 us.

    Whether denormal numbers are flushed is of this thread, and of those that it starts.
    """
    return {name: getter() for name, (getter, _) in _known().items()}


def set_settings(settings: Mapping[str, Any]) -> None:
    """Set what differs here. Local; call it in the thread that computes.

    The default device is none of them: each rank has its own, and what nbdist keeps lies on the CPU.
    """
    for name, (getter, setter) in _known().items():
        value = settings.get(name)
        if value is not None and getter() != value:
            setter(value)
