"""Per sample: a step without what dropout, noise and BatchNorm do, which depends on chance or on the whole batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["PerSample"]

_DROPOUTS = {
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_",
}  # fmt: skip
_NOISE = 0.4
"""What all noise between 0 and 1 is, and how many deviations all other noise is above its mean."""


class PerSample(TorchFunctionMode):
    """Context in which dropout returns its input, noise is one number, and BatchNorm uses no statistics. Local.

    What is drawn from a distribution of each sample's own depends on that alone. So a loss that is a mean over samples
    is the mean of its slices' losses.

    Attributes:
        normalizes: Whether BatchNorm took statistics of a batch, or would have.
        replaces: Whether something was to be drawn, perhaps from a generator of the step's own.
    """

    normalizes = replaces = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if (fixed := _FIXED.get(name)) is not None and kwargs.get("out") is None:
            with contextlib.suppress(TypeError):  # of arguments in yet another form: then it draws, which is noted
                fixed_value = fixed(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
                self.replaces = True
                return fixed_value
        if name == "batch_norm" and (normalized := _normalized(args, kwargs)) is not None:
            self.normalizes = True
            return normalized
        if name == "scaled_dot_product_attention":
            args, kwargs = _without(args, kwargs, 4)
        if name == "multi_head_attention_forward":  # its own calls of `dropout` are not seen here
            args, kwargs = _without(args, kwargs, 10)
        return function(*args, **kwargs)


def _sized(value: float, *size: Any, **kwargs: Any) -> torch.Tensor:
    """What ``torch.rand`` returns for such arguments, of one number."""
    if "size" in kwargs:
        size = (kwargs.pop("size"),)
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return torch.full(tuple(shape), value, **{"dtype": torch.get_default_dtype(), **kwargs})


def _like(input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.full_like(input, _NOISE, **kwargs)


def _normal(mean: Any, std: Any = 1.0, size: Any = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        value = mean + _NOISE * std
        return value if size is None else _sized(value, size, **kwargs)


def _randint(*bounds: Any, size: Any = None, low: int = 0, high: int = 1, **kwargs: Any) -> torch.Tensor:
    if size is None:
        *bounds, size = bounds  # type: ignore[assignment]
    if bounds:  # the lowest may be left out
        low, high = bounds if len(bounds) > 1 else (low, bounds[0])
    return _sized(low + int(_NOISE * (high - low)), size, **{"dtype": torch.int64, **kwargs})


def _randint_like(input: torch.Tensor, *bounds: int, low: int = 0, high: int = 1, **kwargs: Any) -> torch.Tensor:
    if bounds:
        low, high = bounds if len(bounds) > 1 else (low, bounds[0])
    return torch.full_like(input, low + int(_NOISE * (high - low)), **kwargs)


def _bernoulli(input: torch.Tensor, p: float | None = None) -> torch.Tensor:
    likely = input if p is None else torch.full_like(input, p)
    return (likely > _NOISE).to(input.dtype)


def _multinomial(input: torch.Tensor, num_samples: int, replacement: bool = False) -> torch.Tensor:
    if replacement:
        return input.argmax(-1, keepdim=True).expand(*input.shape[:-1], num_samples)
    return input.topk(num_samples).indices


def _gumbel_softmax(
    logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 0.0, dim: int = -1
) -> torch.Tensor:
    del eps
    soft = (logits / tau).softmax(dim)
    if not hard:
        return soft
    most = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return most - soft.detach() + soft


def _normal_(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return tensor.fill_(mean + _NOISE * std)


def _bernoulli_(tensor: torch.Tensor, p: Any = 0.5) -> torch.Tensor:
    return tensor.copy_(p > _NOISE) if isinstance(p, torch.Tensor) else tensor.fill_(float(p > _NOISE))


def _uniform_(tensor: torch.Tensor, *bounds: float, **named: float) -> torch.Tensor:
    """Its first bound is called "from", which no parameter can be."""
    low, high = (*bounds, *(0.0, 1.0)[len(bounds) :])
    low, high = named.get("from", low), named.get("to", high)
    return tensor.fill_(low + _NOISE * (high - low))


_FIXED: dict[str, Callable[..., torch.Tensor]] = {
    "rand": functools.partial(_sized, _NOISE),
    "randn": functools.partial(_sized, _NOISE),
    "rand_like": _like,
    "randn_like": _like,
    "normal": _normal,
    "randint": _randint,
    "randint_like": _randint_like,
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "gumbel_softmax": _gumbel_softmax,
    "poisson": torch.round,
    "_standard_gamma": lambda shape: shape * 1.0,
    "_sample_dirichlet": lambda shape: shape / shape.sum(-1, keepdim=True),
    "rrelu": lambda x, lower=1 / 8, upper=1 / 3, *_, **__: nn.functional.leaky_relu(x, (lower + upper) / 2),
    "normal_": _normal_,
    "uniform_": _uniform_,
    "bernoulli_": _bernoulli_,
    "exponential_": lambda tensor, lambd=1.0: tensor.fill_(_NOISE / lambd),
    "log_normal_": lambda tensor, *_, **__: tensor.fill_(_NOISE),
    "cauchy_": lambda tensor, *_, **__: tensor.fill_(_NOISE),
    "geometric_": lambda tensor, *_, **__: tensor.fill_(1),
    "random_": lambda tensor, *_, **__: tensor.fill_(0),
}
"""Functions that draw random numbers, and what takes their place; ``torch.randperm`` has no such thing."""


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
