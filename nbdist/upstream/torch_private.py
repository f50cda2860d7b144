"""What nbdist uses of torch that torch does not document. Where a version lacks one, the import of this module says so.

`tests/upstream/test_torch_private.py` shows that each does what it should, and fails for a version not in `VERIFIED`.
What is private but the subject of a whole module stays there: see "Private APIs" in DECISIONS.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

__all__ = [
    "VERIFIED",
    "GroupHidden",
    "ThreadModes",
    "check_input_dim",
    "first_hook_number",
    "graph_dtypes",
    "graph_task",
    "has_module_hooks",
    "in_func_transform",
    "is_persistent",
    "make_subclass",
    "neg_view",
    "number_hooks_from",
    "pytree",
    "replace_buffer",
    "reset_group_count",
    "set_tensor_hooks",
    "storage_key",
    "tensor_hooks",
    "typed_storage",
    "without_torch_function",
]

VERIFIED = ("2.13.0",)
"""The versions that were tested."""

_NEEDED: dict[Any, tuple[str, ...]] = {
    torch: ("TypedStorage", "_neg_view"),
    torch.Tensor: ("_backward_hooks", "_make_subclass", "_post_accumulate_grad_hooks"),
    torch.UntypedStorage: ("_cdata",),
    dist.GroupMember: ("WORLD",),
    torch._C: ("DisableTorchFunctionSubclass", "_current_graph_task_id"),
    torch._C._functorch: ("peek_interpreter_stack",),
    RemovableHandle: ("next_id",),
    nn.BatchNorm1d: ("_check_input_dim",),
    pytree: ("TreeSpec", "tree_flatten", "tree_leaves", "tree_unflatten", "treespec_dumps", "treespec_loads"),
}


def _check(needed: dict[Any, tuple[str, ...]]) -> None:
    missing = [
        f"{owner.__name__}.{name}" for owner, names in needed.items() for name in names if not hasattr(owner, name)
    ]
    if missing:
        raise ImportError(
            f"torch {torch.__version__} has no {', '.join(missing)}: install torch {VERIFIED[-1]}, with which this "
            "version of nbdist was tested."
        )


_check(_NEEDED)


def tensor_hooks(tensor: Any) -> tuple[Any, Any]:
    """The dicts of hooks on a leaf tensor: those that get its gradient, and those after it was accumulated; or None."""
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


def set_tensor_hooks(tensor: Any, before: Any, after: Any) -> None:
    """Replace both dicts, the objects that a `RemovableHandle` refers to; None only where a tensor has none."""
    tensor._backward_hooks, tensor._post_accumulate_grad_hooks = before, after


def has_module_hooks(module: nn.Module) -> bool:
    """Whether a module's call runs hooks of its own."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a buffer of a module is part of its ``state_dict``."""
    return name not in module._non_persistent_buffers_set


def replace_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> bool:
    """Give a module another buffer of a name, also one that is None; returns whether it has the name."""
    known = name in module._buffers
    if known:
        module._buffers[name] = buffer
    return known


def graph_dtypes(loss: torch.Tensor) -> set[torch.dtype]:
    """The dtypes of what the operations of a loss's graph have computed; none where torch does not say."""
    found, seen, left = set[torch.dtype](), set[Any](), [loss.grad_fn]
    while left:
        if (function := left.pop()) is not None and function not in seen:
            seen.add(function)
            found.update(result.dtype for result in getattr(function, "_input_metadata", ()))
            left += [other for other, _ in function.next_functions]
    return found


def graph_task() -> int:
    """The number of the backward that autograd runs in this thread, the innermost one; -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def in_func_transform() -> bool:
    """Whether a transform of ``torch.func``, such as vmap, runs in this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def first_hook_number() -> int:
    """The number that the next hook of this process gets."""
    return RemovableHandle.next_id


def number_hooks_from(number: int) -> None:
    """Hooks of this process get this number or a later one."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, number)


class ThreadModes:
    """The modes of torch in this thread (of gradients, functions, dispatch), to be put back after an interrupt. Local.

    One may land in the first or last line of a context such as ``torch.no_grad()``, which then stays open: what runs
    next in the thread would compute without gradients, or without dropout, and nobody would see why. Modes that others
    have opened before stay. Without torch's functions for the stacks, gradients alone are put back.
    """

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._depths = [length() for length, _ in self._stacks()]

    def put_back(self) -> None:
        """Close what has been opened since, and let gradients be as they were."""
        torch.set_grad_enabled(self._gradients)
        for depth, (length, pop) in zip(self._depths, self._stacks(), strict=True):
            while length() > depth:
                pop()

    @staticmethod
    def _stacks() -> list[tuple[Any, Any]]:
        places = (torch.overrides, "_len_torch_function_stack"), (_python_dispatch, "_len_torch_dispatch_stack")
        return [(getattr(p, n), p._pop_mode) for p, n in places if hasattr(p, n) and hasattr(p, "_pop_mode")]


def make_subclass(kind: type[torch.Tensor], data: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A tensor of a class with the memory of another, without calling the class."""
    return torch.Tensor._make_subclass(kind, data, requires_grad)


def neg_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor that is lazily negated, as the imaginary part of a conjugate is."""
    return torch._neg_view(tensor)


def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    """The typed view of a storage; quantized tensors still have it."""
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def without_torch_function() -> Any:
    """A context in which subclasses of tensors do not see what is done with them."""
    return torch._C.DisableTorchFunctionSubclass()


def storage_key(tensor: torch.Tensor) -> int:
    """Identifies a tensor's storage, also one without memory, whose address is 0."""
    return int(tensor.untyped_storage()._cdata)


def check_input_dim(layer: Any, x: torch.Tensor) -> None:
    """Raise as a batch norm layer does for an input of the wrong number of dimensions."""
    layer._check_input_dim(x)


def reset_group_count() -> None:
    """Let the next process group count as this process's first one.

    torch puts a group counter into the keys of the rendezvous, and a failed attempt leaves it advanced. Without the
    counter's place, a rank that could not create a group has to be replaced.
    """
    numbered = getattr(dist.distributed_c10d, "_world", None)
    if numbered is not None and hasattr(numbered, "group_count") and not dist.is_initialized():
        numbered.group_count = 0


class GroupHidden:
    """Context in which `torch.distributed` has no group in this process: it is not initialised, rank 0 of 1. Local.

    For code that asks while no collective is under way in another thread. Where a version keeps its group elsewhere,
    nothing is hidden.
    """

    def __enter__(self) -> None:
        """Take the group away."""
        self._module: Any = getattr(dist, "distributed_c10d", None)
        world: Any = getattr(self._module, "_world", None)
        self._group = getattr(world, "default_pg", None)
        self._find = getattr(self._module, "_get_default_group", None)
        if self._group is not None:
            module: Any = self._module
            world.default_pg, module._get_default_group = None, _alone

    def __exit__(self, *_: Any) -> None:
        """Give it back."""
        if self._group is not None:
            module: Any = self._module
            module._world.default_pg, module._get_default_group = self._group, self._find


class _Alone:
    """What code that asks the default group for its rank and size gets while the group is hidden."""

    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 1


def _alone() -> Any:
    return _Alone
