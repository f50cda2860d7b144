"""Models that a callable builds: their weights lie in files, so that no process needs memory for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nbdist.core.transfer.file_memory import FileMemory, extent_of, has_extents
from nbdist.core.transfer.safetensors_files import StoredTensor, stored_tensors
from nbdist.errors import NbdistError, TaskError
from nbdist.upstream.torch_private import make_subclass

__all__ = ["builds_model", "built_model", "lies_in_file", "move_to_file"]

_ON_META = "_nbdist_on_meta"


def builds_model(value: Any) -> bool:
    """Whether a value is a callable that builds a model, not a model or its class. Local."""
    return callable(value) and not isinstance(value, (nn.Module, type))


def built_model(build: Callable[[], Any], weights: str | None, name: str) -> nn.Module:
    """Call `build`; what its modules register as parameters and buffers moves into a file at once. Local.

    Args:
        build: Returns the model.
        weights: A safetensors file, or a folder of several, with the parameters of the model. Then `build` makes them
            on the meta device, without memory, and each process reads the parts of the file that it needs. None to
            train what `build` makes.
        name: The user's name of `build`.

    Raises:
        TaskError: `build` raised an error, or the file does not have the model's weights.
    """
    memory = FileMemory()

    def hold(tensor: torch.Tensor) -> None:
        tensor.data = memory.hold(tensor.data)

    try:
        with _registering(hold if weights is None else _on_meta, hold):
            model = build()
    except NbdistError:
        raise
    except Exception as error:
        text = f"{name}() raised {type(error).__name__}: {error}"
        raise TaskError(text).with_traceback(error.__traceback__) from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name}() returned a value of type {type(model).__name__}: let it return a torch.nn.Module.")
    if weights is not None:
        _load(model, weights, stored_tensors(weights), memory, name)
    move_to_file(model, memory, but_files=True)
    return model


def lies_in_file(model: nn.Module) -> bool:
    """Whether a callable has built the model, now or for an earlier run. Local."""
    return has_extents() and any(extent_of(parameter.untyped_storage()) for parameter in model.parameters())


def move_to_file(model: nn.Module, memory: FileMemory, *, but_files: bool = False) -> None:
    """Move the parameters and buffers of a model into a file, all but small ones. Local.

    Args:
        model: The model.
        memory: The file.
        but_files: Whether those that lie in a file already stay there.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not (tensor.is_meta or (but_files and extent_of(tensor.untyped_storage()))):
            tensor.data = memory.hold(tensor.data)


@contextlib.contextmanager
def _registering(of_parameter: Callable[[Any], Any], of_buffer: Callable[[Any], Any]) -> Iterator[None]:
    """Context in which these functions get each tensor that a module registers, and may return another."""

    def hook(change: Callable[[Any], Any]) -> Callable[..., Any]:
        def registered(_module: nn.Module, _name: str, tensor: Any) -> Any:
            lazy = isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
            return None if tensor is None or lazy or tensor.is_meta else change(tensor)

        return registered

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(register_module_parameter_registration_hook(hook(of_parameter)).remove)
        cleanup.callback(register_module_buffer_registration_hook(hook(of_buffer)).remove)
        yield


def _on_meta(parameter: nn.Parameter) -> Any:
    """The same parameter on the meta device, and the same one again if it is registered twice."""
    found = getattr(parameter, _ON_META, None)
    if found is None:
        found = _same_kind(parameter, torch.empty_like(parameter, device="meta"))
        setattr(parameter, _ON_META, found)
    return found


def _same_kind(parameter: nn.Parameter, data: torch.Tensor) -> Any:
    """A parameter of the same class, with the same attributes and other data."""
    made = make_subclass(type(parameter), data, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _load(
    model: nn.Module, weights: str, stored: dict[str, StoredTensor], memory: FileMemory, name: str
) -> None:  # fmt: skip
    """Give a model on the meta device the tensors of a file, under any of their names."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, one in module._parameters.items():
            if one is not None:
                places.setdefault(id(one), []).append((f"{path}.{key}" if path else key, module, key))
    missing = [owners[0][0] for owners in places.values() if not any(path in stored for path, *_ in owners)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        has = f"it has {next(iter(stored))} and {len(stored) - 1} more" if stored else "it is empty"
        raise TaskError(
            f"weights={weights} lacks {missing[0]}{more} of the model that {name}() builds; {has}. If a library "
            f"renames weights where it loads them, let {name}() do that."
        )
    for owners in places.values():
        path = next(path for path, *_ in owners if path in stored)
        parameter: Any = owners[0][1]._parameters[owners[0][2]]
        data = _checked(stored[path], parameter, path, weights).mapped()
        if data.dtype != parameter.dtype:  # converted, as load_state_dict does
            data = memory.empty_like(parameter).copy_(data)
        loaded = _same_kind(parameter, data)
        for _, module, key in owners:
            module._parameters[key] = loaded
    for path, buffer in model.named_buffers():
        if path in stored:
            buffer.copy_(_checked(stored[path], buffer, path, weights).mapped())


def _checked(stored: StoredTensor, tensor: torch.Tensor, path: str, weights: str) -> StoredTensor:
    if stored.shape != tensor.shape:
        raise TaskError(
            f"{path} is of shape {tuple(stored.shape)} in weights={weights}, and {tuple(tensor.shape)} in the model."
        )
    return stored
