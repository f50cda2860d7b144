"""Models that a callable builds: their weights lie in a file, so that no process needs memory for all of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nbdist.core.transfer.file_memory import SMALL_BYTES, FileMemory, extent_of, has_extents
from nbdist.errors import NbdistError, TaskError

__all__ = ["builds_model", "built_model", "lies_in_file", "move_to_file"]


def builds_model(value: Any) -> bool:
    """Whether a value is a callable that builds a model, not a model or its class. Local."""
    return callable(value) and not isinstance(value, (nn.Module, type))


def built_model(build: Callable[[], Any], weights: str | None, name: str) -> nn.Module:
    """Call `build`; what its modules register as parameters and buffers moves into a file at once. Local.

    Args:
        build: Returns the model.
        weights: A safetensors file, or a folder of several, which is loaded into the model; None for none.
        name: The user's name of `build`.

    Raises:
        TaskError: `build` raised an error, its model shares memory with something else, or the file does not fit.
    """
    mover = _Mover(FileMemory())
    try:
        with mover.registering():
            model = build()
    except NbdistError:
        raise
    except Exception as error:
        text = f"{name}() raised {type(error).__name__}: {error}"
        raise TaskError(text).with_traceback(error.__traceback__) from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name}() returned a value of type {type(model).__name__}: let it return a torch.nn.Module.")
    mover.move_all(model)
    mover.check_alone(model, name)
    if weights is not None:
        _load(model, weights, name)
    return model


def lies_in_file(model: nn.Module) -> bool:
    """Whether a callable has built the model, now or for an earlier run. Local."""
    return has_extents() and any(
        extent_of(parameter.untyped_storage()) for parameter in model.parameters() if _is_plain(parameter)
    )


def move_to_file(model: nn.Module) -> None:
    """Move the parameters and buffers of a model into a file, all but small ones and those in a file. Local."""
    _Mover(FileMemory()).move_all(model)


class _Mover:
    """Moves the memory of tensors into a file; those that share memory still do."""

    def __init__(self, memory: FileMemory) -> None:
        self._memory = memory
        self._moved: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}  # by address: what was there, and is now

    @contextlib.contextmanager
    def registering(self) -> Iterator[None]:
        """Context in which what a module registers is moved at once."""

        def registered(_module: nn.Module, _name: str, tensor: Any) -> None:
            self.move(tensor)

        with contextlib.ExitStack() as cleanup:
            cleanup.callback(register_module_parameter_registration_hook(registered).remove)
            cleanup.callback(register_module_buffer_registration_hook(registered).remove)
            yield

    def move_all(self, model: nn.Module) -> None:
        """Move all parameters and buffers of a model."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.move(tensor)

    def move(self, tensor: Any) -> None:
        """Move the whole memory in which a plain tensor lies, unless it is small, or in a file already."""
        if not _is_plain(tensor):
            return
        data = tensor.data
        storage = data.untyped_storage()
        if storage.nbytes() < SMALL_BYTES or extent_of(storage):
            return
        before, flat = self._moved.get(storage.data_ptr(), (None, None))
        if flat is None or before is None or before.expired():
            flat = self._memory.bytes(storage.nbytes())
            flat.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            self._moved[storage.data_ptr()] = StorageWeakRef(storage), flat
        whole = flat[: flat.numel() // data.itemsize * data.itemsize].view(data.dtype)
        tensor.data = whole.as_strided(data.shape, data.stride(), data.storage_offset())

    def check_alone(self, model: nn.Module, name: str) -> None:
        """Check that nothing else holds the memory that was moved, whose values would no longer be the model's.

        Raises:
            TaskError: Something does.
        """
        if all(before.expired() for before, _ in self._moved.values()):
            return
        gc.collect()  # cycles
        for before, flat in self._moved.values():
            if not before.expired():
                tensors = dict([*model.named_parameters(), *model.named_buffers()])
                there = flat.untyped_storage().data_ptr()
                path = next((n for n, t in tensors.items() if t.untyped_storage().data_ptr() == there), "a tensor")
                raise TaskError(
                    f"{path} of the model that {name}() builds shares its memory with another tensor, which cannot "
                    f"follow it into a file: let {name}() register a copy (.clone()), or keep no other tensor of it."
                )


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is on the CPU, dense, and has memory of its own."""
    return (
        isinstance(tensor, torch.Tensor)
        and not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
    )


def _load(model: nn.Module, weights: str, name: str) -> None:
    """Load safetensors files into a model, one tensor at a time."""
    place = Path(weights).expanduser().absolute()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        what = "holds no safetensors file" if place.is_dir() else "does not exist"
        raise TaskError(f"weights={weights} {what}: give a .safetensors file, or the folder of several.")
    names: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for path, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(id(tensor), []).append(path)
    loaded: set[str] = set()
    try:
        for file in files:
            with safe_open(str(file), framework="pt") as stored:
                for path in stored.keys():  # noqa: SIM118 - it is no mapping
                    if path not in tensors:
                        continue
                    _copy(tensors[path], stored.get_tensor(path), path, weights)
                    loaded.update(names[id(tensors[path])])
    except (OSError, SafetensorError) as error:
        raise TaskError(f"weights={weights} cannot be read ({error}): is it complete?") from error
    missing = [path for paths in names.values() for path in paths[:1] if path not in loaded]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TaskError(
            f"weights={weights} lacks {missing[0]}{more} of the model that {name}() builds. If a library renames "
            f"weights where it loads them, let {name}() do that."
        )


@torch.no_grad()
def _copy(tensor: torch.Tensor, values: torch.Tensor, path: str, weights: str) -> None:
    if values.shape != tensor.shape:
        raise TaskError(
            f"{path} is of shape {tuple(values.shape)} in weights={weights}, and {tuple(tensor.shape)} in the model."
        )
    tensor.data.copy_(values)
