"""What torch does not document does what we think: a new version that changes it fails here, with the place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nbdist.upstream import torch_private as private


def test_this_version_was_tested():
    """After an upgrade: read DECISIONS.md, "Private APIs", run all tests with it, and add it to VERIFIED."""
    assert torch.__version__.partition("+")[0] in private.VERIFIED


def test_a_torch_that_lacks_one_says_so_when_it_is_loaded():
    """With the version that has it."""
    text = re.escape(f"torch {torch.__version__} has no Tensor._gone: install torch {private.VERIFIED[-1]}")
    with pytest.raises(ImportError, match=text):
        private._check({torch.Tensor: ("_gone", "_make_subclass")})


def test_nothing_else_of_torch_is_private_here():
    """Its underscored names stand in this one module, but for those that are a module's whole subject."""
    names = [name.lstrip("_") for needed in private._NEEDED.values() for name in needed if name.startswith("_")]
    package = Path(private.__file__).parents[1]
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(f"._{name}" in path.read_text() for name in names)
        or "utils._pytree" in path.read_text()
        or "from torch.utils import _pytree" in path.read_text()
    }
    assert {"upstream/torch_private.py"} == found


def test_hooks_can_be_taken_off_a_tensor_and_put_back():
    """The same dicts, so that their handles still remove them."""
    leaf, seen = nn.Parameter(torch.ones(2)), []
    assert (None, None) == private.tensor_hooks(leaf)
    handle = leaf.register_hook(lambda gradient: seen.append("before"))
    leaf.register_post_accumulate_grad_hook(lambda tensor: seen.append("after"))
    before, after = private.tensor_hooks(leaf)
    private.set_tensor_hooks(leaf, OrderedDict(), OrderedDict())
    leaf.sum().backward()
    assert [] == seen
    private.set_tensor_hooks(leaf, before, after)
    leaf.sum().backward()
    assert ["before", "after"] == seen
    handle.remove()
    leaf.sum().backward()
    assert ["before", "after", "after"] == seen


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                 "register_full_backward_pre_hook"],
)  # fmt: skip
def test_hooks_of_a_module_are_seen(register):
    """Of each kind."""
    module = nn.Linear(1, 1)
    assert not private.has_module_hooks(module)
    getattr(module, register)(print)
    assert private.has_module_hooks(module)


def test_a_transform_of_torch_func_is_seen():
    """While it runs, and not before or after it."""
    seen = [private.in_func_transform()]
    torch.func.vmap(lambda x: (seen.append(private.in_func_transform()), x)[1])(torch.ones(2))
    assert [False, True, False] == [*seen, private.in_func_transform()]


def test_a_backward_within_another_has_a_number_of_its_own():
    """And none is there outside."""
    x, inner, seen = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True), [private.graph_task()]

    def nested(_gradient):
        seen.append(private.graph_task())
        with torch.enable_grad():
            z = inner * 2
        z.register_hook(lambda _: seen.append(private.graph_task()))
        torch.autograd.grad(z, inner)
        seen.append(private.graph_task())

    y = x * 2
    y.register_hook(nested)
    y.backward()
    outside, outer, nested_one, again = seen
    assert outside == private.graph_task() == -1
    assert -1 != outer == again != nested_one != -1


def test_hooks_are_numbered():
    """The next one gets the number, and numbers never go back."""
    number = private.first_hook_number()
    assert number == nn.Parameter(torch.ones(1)).register_hook(print).id
    private.number_hooks_from(number + 10)
    private.number_hooks_from(number)
    assert number + 10 == nn.Parameter(torch.ones(1)).register_hook(print).id


class Kind(torch.Tensor):
    """A class whose functions and constructor cannot be used."""

    def __init__(self, *_):
        raise AssertionError

    @classmethod
    def __torch_function__(cls, *_, **__):
        raise AssertionError


def test_a_tensor_of_a_class_is_made_without_calling_it():
    """It shares the memory; and what is done with it inside the context, the class does not see."""
    data = torch.ones(3)
    with private.without_torch_function():
        made = private.make_subclass(Kind, data, True)
        assert (Kind, True, data.data_ptr()) == (type(made), made.requires_grad, made.data_ptr())
        assert 3.0 == made.sum().item()
    with pytest.raises(AssertionError):
        made.sum()


def test_a_lazily_negated_view():
    """Shares the memory, and counts as negated."""
    values = torch.tensor([1.0, -2.0])
    view = private.neg_view(values)
    assert ([-1.0, 2.0], True, values.data_ptr()) == (view.tolist(), view.is_neg(), view.data_ptr())


def test_a_storage_has_a_typed_view():
    """Of the same memory."""
    storage = torch.tensor([1.0, 2.0]).untyped_storage()
    typed = private.typed_storage(storage, torch.float32)
    assert (torch.float32, storage.data_ptr()) == (typed.dtype, typed._untyped_storage.data_ptr())


def test_a_storage_is_known_by_its_key():
    """Views share it, copies do not; a storage without memory has one too."""
    whole, other = torch.ones(4), torch.ones(4)
    assert private.storage_key(whole) == private.storage_key(whole[2:]) != private.storage_key(other)
    first, second = (torch.ones(2, device="meta") for _ in range(2))
    assert private.storage_key(first) == private.storage_key(first.view(1, 2)) != private.storage_key(second)


def test_batch_norm_refuses_an_input_of_other_dimensions():
    """Each kind for itself."""
    private.check_input_dim(nn.BatchNorm2d(3), torch.ones(1, 3, 2, 2))
    with pytest.raises(ValueError, match="expected 4D input"):
        private.check_input_dim(nn.BatchNorm2d(3), torch.ones(1, 3))


def test_nested_values_are_flattened_and_described_as_json():
    """In the order of the values, through tuples, lists and dicts; the description can be read back."""
    nested = ([1, {"b": 2, "a": 3}], (4,))
    leaves, structure = private.pytree.tree_flatten(nested)
    assert [1, 2, 3, 4] == leaves == private.pytree.tree_leaves(nested)
    text = private.pytree.treespec_dumps(structure)
    assert nested == private.pytree.tree_unflatten(leaves, private.pytree.treespec_loads(text))


GROUPS = """
import torch.distributed as dist
from nbdist.upstream.torch_private import reset_group_count

for _ in range(3):
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    print(dist.distributed_c10d._world.group_count)
    dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 7  # as a failed attempt leaves it
    reset_group_count()
"""


def test_the_next_group_counts_as_the_first():
    """Though one could not be created."""
    counts = subprocess.run(
        [sys.executable, "-c", GROUPS], capture_output=True, text=True, check=True, env={**os.environ}
    ).stdout.split()
    assert 1 == len(set(counts))
    assert 3 == len(counts)


def test_without_the_groups_counter_nothing_is_reset(monkeypatch):
    """Where torch has moved it."""
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace())
    private.reset_group_count()
    assert {} == vars(dist.distributed_c10d._world)


def test_a_buffer_of_a_module_can_be_replaced():
    """Also one that is None; whether it is saved stays as it was."""
    module = nn.Module()
    module.register_buffer("kept", None)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert private.replace_buffer(module, "kept", torch.ones(1))
    assert private.replace_buffer(module, "scratch", None)
    assert not private.replace_buffer(module, "line", torch.ones(1))
    assert ["kept"] == [*module.state_dict()]
    assert (True, False) == (private.is_persistent(module, "kept"), private.is_persistent(module, "scratch"))


def test_a_graph_says_in_which_dtypes_it_was_computed():
    """Those between the loss and its leaves; none without a graph."""
    leaf = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = (leaf.float() * 2).bfloat16().double().sum()
    assert {torch.float64, torch.float32, torch.bfloat16} == private.graph_dtypes(loss)
    assert set() == private.graph_dtypes(torch.ones(()))


def test_without_a_default_group_a_process_is_alone(tmp_path):
    """What asks for the group finds none, or a world of one rank; afterwards it is there again."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with private.GroupHidden():
            assert not dist.is_initialized()
            assert (0, 1) == (dist.get_rank(), dist.get_world_size())
        assert dist.is_initialized()
        assert group is dist.group.WORLD
    finally:
        dist.destroy_process_group()
    with private.GroupHidden():
        assert not dist.is_initialized()


class _Function(torch.overrides.TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    """The same, below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_that_stay_open_are_closed_and_those_before_are_not():
    """As an interrupt in the first line of a context leaves them."""
    with _Function() as own:
        modes = private.ThreadModes()
        torch.set_grad_enabled(False)
        _Function().__enter__()
        _Dispatch().__enter__()
        modes.put_back()
        assert torch.is_grad_enabled()
        assert torch.overrides._get_current_function_mode_stack() == [own]
        assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
