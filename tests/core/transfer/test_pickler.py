"""Pickling preserves types, identities, shared memory, attributes, hooks, weak references."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.hooks import RemovableHandle

from nbdist.core.transfer.payload import pack, unpack
from nbdist.errors import TaskError


def there_and_back(value):
    payload, segment = pack(value)
    try:
        return unpack(payload)
    finally:
        segment.close()


class Marked(torch.Tensor):
    """A tensor subclass without own behaviour."""


class MarkedParameter(nn.Parameter):
    """A parameter subclass, as quantization libraries have."""


def with_attributes(tensor):
    tensor.mark = "mine"
    tensor.also = [tensor]  # a cycle
    return tensor


def meta(shape=(2, 3)):
    return torch.empty(shape, device="meta")


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged)


BASE = torch.arange(12.0).view(3, 4)
TENSORS = {
    "buffer": lambda: nn.Buffer(BASE.clone()),
    "buffer that is not persistent": lambda: nn.Buffer(BASE.clone(), persistent=False),
    "tensor with attributes": lambda: with_attributes(BASE.clone()),
    "parameter with attributes": lambda: with_attributes(nn.Parameter(BASE.clone())),
    "frozen parameter": lambda: nn.Parameter(BASE.clone(), requires_grad=False),
    "subclass": lambda: with_attributes(BASE.clone().as_subclass(Marked)),
    "subclass of parameters": lambda: with_attributes(MarkedParameter(BASE.clone())),
    "parameter of a subclass": lambda: nn.Parameter(BASE.clone().as_subclass(Marked)),
    "channels last": lambda: nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    "meta": meta,
    "meta parameter": lambda: nn.Parameter(meta()),
    "uninitialized parameter": lambda: nn.UninitializedParameter(dtype=torch.float64),
    "uninitialized buffer": lambda: nn.UninitializedBuffer(dtype=torch.float64, persistent=False),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.eye(3).to_sparse().requires_grad_(),
    "sparse with attributes": lambda: with_attributes(torch.eye(3).to_sparse()),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "sparse parameter": lambda: nn.Parameter(torch.eye(3).to_sparse()),
    "quantized": lambda: torch.quantize_per_tensor(BASE, 0.1, 10, torch.quint8),
    "quantized by channel": lambda: torch.quantize_per_channel(
        BASE, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 2, 3]), 0, torch.qint8
    ),
    "jagged": nested,
    "jagged with a gradient": lambda: nested().detach().requires_grad_(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
}


def described(tensor):
    """A tensor's metadata."""
    lazy = isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
    ragged = not lazy and tensor.is_nested
    attributes = {name: value for name, value in vars(tensor).items() if name in ("mark", "persistent", "_is_buffer")}
    return {
        "type": type(tensor), "device": tensor.device, "dtype": tensor.data.dtype, "attributes": attributes,
        "requires_grad": tensor.requires_grad, "parameter": isinstance(tensor, nn.Parameter),
        "buffer": isinstance(tensor, nn.Buffer), "leaf": tensor.is_leaf,
        **({} if lazy else {"layout": tensor.layout, "conj": tensor.is_conj(), "neg": tensor.is_neg()}),
        **({} if lazy or ragged else {"shape": tuple(tensor.shape)}),
        **({"stride": tensor.stride()} if not (lazy or ragged) and tensor.layout is torch.strided else {}),
    }  # fmt: skip


def values(tensor):
    plain = tensor.detach()
    plain = plain.as_subclass(torch.Tensor) if isinstance(tensor, Marked) else plain
    if plain.is_quantized:
        return plain.dequantize()
    if plain.is_nested:
        return torch.cat([each.flatten() for each in plain.unbind()])
    return plain.to_dense()


@pytest.mark.filterwarnings("ignore")  # that some layouts are young, and some are old
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_as_it_was(name):
    """Class, layout, flags and attributes, and the values if it has any."""
    tensor = TENSORS[name]()
    arrived = there_and_back(tensor)
    assert described(tensor) == described(arrived)
    if "also" in vars(tensor):
        assert arrived is arrived.also[0]
    if tensor.device.type != "meta" and "uninitialized" not in name:
        assert torch.equal(values(tensor), values(arrived))


@pytest.mark.parametrize(
    "share",
    [
        lambda base: nn.Buffer(base),
        lambda base: nn.Parameter(base),
        lambda base: base.as_subclass(Marked),
        lambda base: base.data.t(),
        lambda base: base.numpy(),
        lambda base: torch.from_numpy(base.numpy()[1:]).flatten(),
        lambda base: nn.Parameter(base).requires_grad_(False)[:],
    ],
)
@pytest.mark.parametrize("numbers", [12, 2**18])
def test_what_shares_memory_with_a_tensor_does_so_still(share, numbers):
    """Buffers, parameters, subclasses, views and arrays, small and large: a write to one is visible in the other."""
    base = torch.zeros(3, numbers // 3)
    sent = (share(base), base)
    payload, segment = pack(sent)
    other, arrived = unpack(payload)
    segment.close()
    with torch.no_grad():
        arrived.fill_(7)
    assert bool((other == 7).all())
    assert payload.nbytes < 1.5 * base.nbytes + 4096
    assert not base.any()


def test_the_two_parts_of_a_conjugate_share_memory_still():
    """A conjugate stays a view of its base."""
    numbers = torch.ones(3, dtype=torch.complex64)
    plain, conjugate = there_and_back((numbers, numbers.conj()))
    plain.fill_(2j)
    assert [-2j] * 3 == conjugate.tolist()


def test_arrays_share_memory_still():
    """Two views of one array share memory at the receiver."""
    array = np.zeros(10)
    whole, part = there_and_back((array, array[2:4]))
    whole[:] = 3
    assert [3.0, 3.0] == part.tolist()


def test_tensors_that_hold_nothing_grow_apart():
    """Empty tensors have no memory to share, and get none by accident."""
    first, second = there_and_back([torch.empty(0), torch.empty(0)])
    first.resize_(3).fill_(1)
    second.resize_(3).fill_(2)
    assert [1.0] * 3 == first.tolist()


@pytest.mark.parametrize("make", [lambda w: w * 2, lambda w: (w * 2).as_subclass(Marked)])
def test_a_graph_stays_and_says_so(make):
    """A non-leaf tensor is sent with its values; backward through it raises."""
    weight = nn.Parameter(BASE.clone())
    arrived, there = there_and_back((make(weight), weight))
    assert torch.equal(2 * BASE, arrived.detach())
    assert (False, True) == (arrived.is_leaf, arrived.requires_grad)
    with pytest.raises(TaskError, match=r"before the training began \(\w+Backward0\).*: compute it in the step"):
        (arrived * there).sum().backward()


def twice(gradient):
    return 2 * gradient


def add_one(parameter):
    parameter.grad.add_(1)


def gradient_of(parameter):
    parameter.grad = None
    (parameter * 3).sum().backward()
    return parameter.grad


def test_hooks_of_a_parameter_arrive():
    """Hooks before and after accumulation, and their handles, which remove them at the receiver."""
    parameter = nn.Parameter(torch.zeros(2))
    handles = [
        parameter.register_hook(lambda gradient: gradient * torch.tensor([1.0, 0.0])),
        parameter.register_post_accumulate_grad_hook(add_one),
    ]
    arrived, first, second = there_and_back((parameter, *handles))
    assert [4.0, 1.0] == gradient_of(arrived).tolist()
    first.remove()
    assert [4.0, 4.0] == gradient_of(arrived).tolist()
    second.remove()
    assert [3.0, 3.0] == gradient_of(arrived).tolist()
    assert [4.0, 1.0] == gradient_of(parameter).tolist()


def test_a_hook_that_is_registered_over_there_takes_no_other_ones_place(monkeypatch):
    """Hook ids are per process; unpickled hooks keep theirs, and new ones get others."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.register_hook(twice)
    payload, segment = pack(parameter)
    monkeypatch.setattr(RemovableHandle, "next_id", RemovableHandle.next_id - 1)  # a process with fewer hooks
    arrived = unpack(payload)
    segment.close()
    arrived.register_hook(lambda gradient: gradient + 1)
    assert [7.0] == gradient_of(arrived).tolist()


HOOKS = [
    "register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_state_dict_pre_hook", "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook",
]  # fmt: skip


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_module_arrive(register):
    """Every kind of module hook is called at the receiver."""
    module, calls = nn.Linear(2, 2), []
    getattr(module, register)(lambda *_: calls.append(register))
    arrived, called = there_and_back((module, calls))
    arrived(torch.ones(1, 2, requires_grad=True)).sum().backward()
    arrived.load_state_dict(arrived.state_dict())
    assert called
    assert {register} == set(called)
    assert not calls


class Counting(torch.optim.Adam):
    """It has own attributes, one of them in ``__slots__``."""

    __slots__ = ("rest",)

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.calls = 0
        self.own = list(self.param_groups[0]["params"])
        self.rest = "kept"

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


def stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_an_optimizer_arrives_with_what_it_keeps():
    """Attributes, slots, and a step that a scheduler has wrapped, all bound to the unpickled objects."""
    model = nn.Linear(2, 2)
    optimizer = Counting(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stepped(optimizer)
    there, arrived, follows = there_and_back((model, optimizer, scheduler))
    assert (1, "kept") == (arrived.calls, arrived.rest)
    assert there.weight is arrived.own[0] is arrived.param_groups[0]["params"][0]
    before = there.weight.detach().clone()
    stepped(arrived)
    follows.step()
    assert 2 == arrived.calls
    assert not torch.equal(before, there.weight)
    assert follows.optimizer is arrived
    assert pytest.approx(0.01) == arrived.param_groups[0]["lr"]
    assert (1, 0.1) == (optimizer.calls, optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    "register",
    [
        "register_step_pre_hook", "register_step_post_hook", "register_state_dict_pre_hook",
        "register_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook",
    ],
)  # fmt: skip
def test_hooks_of_an_optimizer_arrive(register):
    """Every kind of optimizer hook is called at the receiver."""
    optimizer, calls = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), []
    handle = getattr(optimizer, register)(lambda *_: calls.append(register))
    arrived, called, its_handle = there_and_back((optimizer, calls, handle))
    stepped(arrived)
    arrived.load_state_dict(arrived.state_dict())
    assert [register] == called
    its_handle.remove()
    stepped(arrived)
    arrived.load_state_dict(arrived.state_dict())
    assert [register] == called


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def parametrized():
    module = nn.Linear(2, 2)
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


class Stateful(nn.Linear):
    """A module with a ``__getstate__``."""

    def __getstate__(self):
        return {**vars(self), "sent": True}


PARAMETRIZED = {
    "parametrization": parametrized,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
    "old weight norm": lambda: torch.nn.utils.weight_norm(nn.Linear(2, 2)),
    "old spectral norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(2, 2)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 2),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_module_whose_weights_are_computed_arrives(name):
    """It computes the same, and so do its gradients."""
    module = PARAMETRIZED[name]()
    arrived = there_and_back(module)
    x = torch.randn(4, 2)
    for each in (module, arrived):
        each.zero_grad()
        each(x).square().sum().backward()
    gradients = [[p.grad for p in each.parameters()] for each in (module, arrived)]
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_parametrized_module_is_sent_as_its_class_says():
    """The user's class may have a ``__getstate__``, which is used."""
    module = Stateful(2, 2)
    parametrize.register_parametrization(module, "weight", Doubled())
    assert there_and_back(module).sent


def test_a_lazy_module_arrives_lazy():
    """It takes its shape from the first batch at the receiver."""
    arrived = there_and_back(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    arrived(torch.ones(5, 4))
    assert (3, 4) == tuple(arrived[0].weight.shape)


class Thing:
    """Something to refer to."""

    def __init__(self):
        self.name = "thing"


def test_weak_references_refer_to_what_arrives():
    """References, proxies and containers refer to the unpickled object, and do not keep it alive."""
    thing = Thing()
    sent = thing, weakref.ref(thing), weakref.proxy(thing), weakref.WeakSet([thing])
    there, reference, proxy, group = there_and_back(sent)
    assert there is reference()
    assert "thing" == proxy.name
    assert [there] == list(group)
    del there
    gc.collect()
    assert (None, []) == (reference(), list(group))


def test_a_weak_dictionary_arrives():
    """With the entries whose keys or values are sent too."""
    thing = Thing()
    there, by_key, by_value = there_and_back(
        (thing, weakref.WeakKeyDictionary({thing: 1}), weakref.WeakValueDictionary({1: thing}))
    )
    assert (1, there) == (by_key[there], by_value[1])


def test_what_is_within_itself_by_a_weak_reference_arrives():
    """An object with a weak reference to itself."""
    thing = Thing()
    thing.me = weakref.ref(thing)
    arrived = there_and_back(thing)
    assert arrived is arrived.me()


def test_a_dead_reference_arrives_dead():
    """Its referent is gone."""
    reference = weakref.ref(Thing())
    assert there_and_back(reference)() is None


class Method(weakref.WeakMethod):
    """A subclass of `weakref.ref`."""


OTHER = Thing()


@pytest.mark.parametrize("name", ["stdout", "stderr", "__stdout__", "__stderr__"])
def test_a_stream_of_the_process_is_the_other_processs_own(monkeypatch, name):
    """The receiver's own streams are used, also for a function's default argument."""

    stream = getattr(sys, name)

    def say(text, file=stream):
        print(text, file=file)

    payload, segment = pack([stream, say])
    monkeypatch.setattr(sys, name, there := io.StringIO())
    arrived, say_there = unpack(payload)
    segment.close()
    say_there("here")
    assert arrived is there
    assert "here\n" == there.getvalue()


REFUSED = {
    "a weak reference to what stays": (lambda: weakref.ref(OTHER), "a weak reference to a Thing that nothing holds"),
    "a weak reference of another kind": (lambda: Method(nn.Linear(1, 1).forward), "a weak reference of a class"),
    "a sparse tensor with a graph": (lambda: (nn.Parameter(torch.eye(2)) * 2).to_sparse(), "with a graph"),
    "a sparse tensor with hooks": (lambda: hooked(torch.eye(2).to_sparse().requires_grad_()), "with hooks"),
}


def hooked(tensor):
    tensor.register_hook(twice)
    return tensor


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_arrive_as_it_is_is_refused(name):
    """In one sentence, before anything is sent."""
    make, sentence = REFUSED[name]
    with pytest.raises(TaskError, match=sentence):
        pack(make())


def test_packing_changes_nothing_here():
    """The sender's own objects are as they were."""
    model = parametrized()
    model.bias.register_hook(twice)
    optimizer = Counting(model.parameters())
    before = copy.copy(vars(optimizer))
    there_and_back((model, optimizer))
    assert before == vars(optimizer)
    assert [6.0, 6.0] == gradient_of(model.bias).tolist()
