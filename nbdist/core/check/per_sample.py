"""Per sample: a step without what dropout, noise and BatchNorm do, which depends on chance or on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["PerSample"]

_DROPOUTS = {
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_",
}  # fmt: skip
_NOISES = {"rand", "rand_like", "randn", "randn_like"}
_NOISES_IN_PLACE = {"uniform_", "normal_"}
_NOISE = 0.4


class PerSample(TorchFunctionMode):
    """Context in which dropout returns its input, noise is one number, and BatchNorm uses no statistics. Local.

    So a loss that is a mean over samples is the mean of its slices' losses.

    Attributes:
        normalizes: Whether BatchNorm took statistics of a batch, or would have.
    """

    normalizes = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in _NOISES and kwargs.get("out") is None:
            kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
            with torch.no_grad():
                return torch.full_like(args[0], _NOISE, **kwargs) if name.endswith("_like") else _filled(args, kwargs)
        if name in _NOISES_IN_PLACE:
            low, high = _bounds(name, args, kwargs)
            return args[0].fill_(low + _NOISE * (high - low))
        if name == "batch_norm" and (normalized := _normalized(args, kwargs)) is not None:
            self.normalizes = True
            return normalized
        if name == "scaled_dot_product_attention":
            args, kwargs = _without(args, kwargs, 4)
        if name == "multi_head_attention_forward":  # its own calls of `dropout` are not seen here
            args, kwargs = _without(args, kwargs, 10)
        return function(*args, **kwargs)


def _filled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What ``torch.rand`` returns for some arguments, of one number."""
    if "size" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("size"),)
    size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
    return torch.full(tuple(size), _NOISE, **{"dtype": torch.get_default_dtype(), **kwargs})


def _bounds(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """Two numbers of which noise in place is between: its bounds, or its mean and that plus its deviation."""
    first, second = ("from", "to") if name == "uniform_" else ("mean", "std")
    low = args[1] if len(args) > 1 else kwargs.get(first, 0.0)
    high = args[2] if len(args) > 2 else kwargs.get(second, 1.0)
    return low, high if name == "uniform_" else low + high


def _without(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with ``dropout_p`` of zero, which may stand at a place."""
    if len(args) > place:
        return (*args[:place], 0.0, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs


def _normalized(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """``torch.nn.functional.batch_norm`` with a mean of 0 and a variance of 1; None if it uses running statistics."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not given.get("training"):
        return None
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    shape = [-1, *[1] * (x.ndim - 2)]
    x = x if weight is None else x * weight.view(shape).to(x.dtype)
    normalized: torch.Tensor = x if bias is None else x + bias.view(shape).to(x.dtype)
    return normalized
