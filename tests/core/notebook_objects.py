"""What a notebook may define and put into a model: the tests run this text as the cells of a notebook."""

import abc
import array
import collections
import concurrent.futures
import contextvars
import dataclasses
import decimal
import enum
import functools
import importlib.util
import io
import itertools
import logging
import operator
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import types
import typing
import weakref
from queue import Queue

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

SENT, REFUSED = {}, {}
"""By name, functions that make an object to be put anywhere; of those that are refused, also the sentence."""


def sent(make):
    SENT[make.__name__] = make
    return make


class Tagged(torch.Tensor):
    pass


class Scaled(nn.Parameter):
    def __new__(cls, data, scale):
        self = super().__new__(cls, data)
        self.scale = scale
        return self


class Slotted(nn.Parameter):
    __slots__ = ("extra",)


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"
    CRIMSON = 1  # noqa: PIE796 - an alias


class Planet(enum.Enum):
    EARTH = (1, 2.0)
    MARS = (3, 4.0)

    def __init__(self, mass, radius):
        self.mass, self.radius = mass, radius


class Coded(enum.Enum):
    def __new__(cls, code, word):
        self = object.__new__(cls)
        self._value_ = code
        self.word = word
        return self

    ONE = 1, "one"
    TWO = 2, "two"


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()
    BOTH = READ | WRITE


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(str, enum.Enum):
    YES = "y"


Pair = collections.namedtuple("Pair", "x y")


class Typed(typing.NamedTuple):
    number: int
    word: str = "q"


@dataclasses.dataclass
class Plain:
    x: int
    y: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int
    y: object = None


class Private:
    __slots__ = ("__hidden", "__weakref__", "open")

    def __init__(self):
        self.open, self.__hidden = 1, [2]

    def hidden(self):
        return self.__hidden


class Below(Private):
    def __init__(self):
        super().__init__()
        self.more = self


class List(list):
    pass


class Dict(dict):
    pass


class Text(str):
    pass


class Number(int):
    pass


class Array(np.ndarray):
    pass


class Local(threading.local):
    common = 1


class Strict:
    """A class that knows its subclasses, each once, by a word that they must give."""

    known: typing.ClassVar[dict] = {}
    order: typing.ClassVar[list] = []

    def __init_subclass__(cls, *, word, **more):
        super().__init_subclass__(**more)
        if word in Strict.known:
            raise ValueError(f"{word} is known")
        Strict.known[word] = cls
        Strict.order.append(word)


class First(Strict, word="first"):
    pass


class Second(First, word="second"):
    pass


class Meta(type):
    made: typing.ClassVar[list] = []

    def __new__(mcs, name, bases, namespace, *, tag):
        self = super().__new__(mcs, name, bases, namespace)
        self.tag = tag
        Meta.made.append(name)
        return self

    def __init__(cls, name, bases, namespace, *, tag):
        super().__init__(name, bases, namespace)


class Made(metaclass=Meta, tag="t"):
    pass


class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...


class Square(Shape):
    def area(self):
        return 1


class Lazy(nn.Module):
    """A property that is computed once, under a lock in older versions of Python."""

    @functools.cached_property
    def table(self):
        return [1]

    @property
    def one(self):
        return 1

    @staticmethod
    def two():
        return 2

    @classmethod
    def own(cls):
        return cls

    class Inner:
        three = 3


class Net(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.line = nn.Linear(2, 2)
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.line(x)

    def method(self, *_):
        return None


NETS = {}


class Registered(nn.Module):
    """The notebook knows each by its name."""

    names: typing.ClassVar[list] = []

    def __init__(self, name):
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.ones(2))
        NETS[name] = self
        Registered.names.append(name)

    def forward(self, x):
        return NETS[self.name].weight * x


@functools.lru_cache(maxsize=7)
def cached(x):
    return cached(x - 1) + 1 if x else 0


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@sent
def tensors():
    tensor = torch.ones(3).as_subclass(Tagged)
    tensor.note = {"itself": tensor}
    base = torch.arange(4.0).view(2, 2)
    return [tensor, base, base[0], base.T, base.numpy(), Tagged(torch.ones(2))]


@sent
def parameters():
    net, slotted = Net(), Slotted(torch.ones(2, 2))
    slotted.extra, slotted.more = "in a slot", 1
    net.line.weight, net.line.bias = slotted, Scaled(torch.ones(2), 3.0)
    net.line.bias.net = Pair(1, net)
    return net


@sent
def module_hooks():
    net = Net()
    net.register_forward_hook(lambda module, given, output: output * 2)
    net.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
    net.register_forward_pre_hook(net.method)
    net.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True, prepend=True)
    for register in (
        net.register_full_backward_hook, net.register_full_backward_pre_hook, net.register_state_dict_post_hook,
        net.register_state_dict_pre_hook, net.register_load_state_dict_post_hook,
        net.register_load_state_dict_pre_hook,
    ):  # fmt: skip
        register(lambda *_: None)
    net.handle = net.line.register_forward_hook(lambda *_: None)
    return net


@sent
def tensor_hooks():
    net = Net()
    net.one = net.line.weight.register_hook(lambda gradient: gradient * 2)
    net.two = net.line.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return net


@sent
def computed_weights():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).T

    net = nn.Linear(2, 2)
    parametrize.register_parametrization(net, "weight", Symmetric())
    net.note = net
    net.register_forward_hook(lambda *_: None)
    both = Net()
    parametrizations.weight_norm(both.line)
    parametrizations.spectral_norm(both.line, "weight")
    return [net, both, nn.utils.spectral_norm(nn.Linear(2, 2)), prune.l1_unstructured(nn.Linear(2, 2), "weight", 1)]


@sent
def late_buffers():
    net = Net()
    net.register_buffer("later", None)
    net.register_buffer("scratch", torch.ones(1), persistent=False)
    net.register_parameter("none", None)
    return net


@sent
def members():
    Color.RED.note = "set later"
    every = enum.Enum("every", "a b")
    return [
        Color.RED, Color.CRIMSON, Color.BLUE, Planet.MARS, Coded.TWO, Access.BOTH, Access.READ | Access.WRITE,
        Level.HIGH, Word.YES, every.a, every, re.I, {Color.RED: 1},
    ]  # fmt: skip


@sent
def records():
    return [Pair(1, torch.ones(1)), Typed(1), Plain(1, [2]), Frozen(1, [3]), Private(), Below()]


@sent
def subclasses():
    made = [List([1]), Dict(a=1), Text("x"), Number(3)]
    for one in made:
        one.note = made
    return [*made, np.ones(2).view(Array), np.array([{"a": 1}, None], dtype=object)]


@sent
def containers():
    return [
        collections.defaultdict(list, a=[1]), collections.Counter("aab"), collections.deque([1, 2], maxlen=2),
        types.MappingProxyType({"a": 1}), types.SimpleNamespace(a=1), bytearray(b"x"), slice(1, 2), frozenset([1]),
        array.array("d", [1.0]), pathlib.PurePosixPath("/x"), decimal.Decimal("1.1"), re.compile("a+"), range(3),
    ]  # fmt: skip


@sent
def functions():
    net = Net()

    def closure(x, more=(1,), *, key="k"):
        return net.line(x), more, key

    closure.note = net
    return [
        net, closure, functools.partial(closure, key=net), net.method, lambda: net, torch.relu, torch.Tensor.add,
        operator.attrgetter("a"), operator.itemgetter(1), cached, functools.cache(lambda x: x),
        functools.wraps(closure)(lambda *_: 1), net.line.weight.add_, torch.no_grad()(lambda x: x),
        itertools.count(3),
    ]  # fmt: skip


@sent
def weak():
    net = Net()
    net.own, net.its = weakref.ref(net), weakref.WeakMethod(net.method)
    net.values, net.keys = weakref.WeakValueDictionary(a=net.line), weakref.WeakKeyDictionary({net.line: 1})
    return net


@sent
def classes():
    lazy = Lazy()
    assert lazy.table
    return [lazy, Lazy.Inner(), lazy.own, Made(), First(), Second(), Strict.order, Square(), list[int]]


@sent
def registered():
    return nn.Sequential(Registered("a"), Registered("b"))


@sent
def loaded():
    module = load("loaded_under_a_name", BY_PATH)  # noqa: F821 - the tests say where
    return [module.Layer("a"), module.helper, module.Mode.FAST]


@sent
def loaded_over_another():
    return load("json.tool", BY_PATH).Layer("b")  # noqa: F821


@sent
def made_by_code():
    module = sys.modules["loaded_as_text"] = types.ModuleType("loaded_as_text")
    exec("class Layer:\n    made = []\n    def __init__(self):\n        self.made.append(self)", module.__dict__)
    return module.Layer()


@sent
def generators():
    return [torch.Generator().manual_seed(3), random.Random(3)]


@sent
def locks():
    local, queue = Local(), Queue()
    local.mine = [1]
    queue.put(local)
    return [
        threading.Lock(),
        threading.RLock(),
        threading.Condition(),
        threading.Event(),
        threading.Semaphore(3),
        queue,
    ]


@sent
def loggers():
    return [logging.getLogger("a.b"), logging.getLogger(), logging.StreamHandler(sys.stdout), logging.NullHandler()]


@sent
def settings():
    return [torch.float16, torch.device("cpu"), torch.finfo(torch.float16), torch.Size([1]), np, torch.nn.functional]


@sent
def optimizers():
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.model, net.optimizer = net, weakref.ref(optimizer)
    loss = nn.CrossEntropyLoss(torch.ones(2))
    loss.model, net.classes = net, loss.weight
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    return [net, optimizer, loss, schedule]


@sent
def layers():
    return [
        nn.LSTM(2, 2, num_layers=2), nn.TransformerEncoderLayer(4, 2), nn.SyncBatchNorm(3),
        nn.ParameterDict({"a": torch.ones(1)}), torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    ]  # fmt: skip


@sent
def loaders():
    data = torch.utils.data.TensorDataset(torch.ones(4, 2))
    generator = torch.Generator().manual_seed(1)
    return [
        torch.utils.data.DataLoader(data, batch_size=2, generator=generator, collate_fn=lambda rows: rows),
        torch.utils.data.WeightedRandomSampler(torch.ones(4), 4),
        *torch.utils.data.random_split(data, [2, 2], generator=generator),
    ]  # fmt: skip


@sent
def patched():
    net = Net()
    net.forward = types.MethodType(lambda self, x: self.line(x) * 2, net)
    other = Net()
    other.__class__ = type("Other", (Net,), {"forward": lambda self, x: 3, "extra": [1]})
    return [net, other]


def refused(make):
    REFUSED[make.__name__] = (make, make.__doc__)
    return make


@refused
def a_file():
    """an open file ('/dev/null')"""
    return open("/dev/null")


@refused
def a_temporary_file():
    """an open file"""
    return tempfile.TemporaryFile()


@refused
def a_socket():
    """a socket"""
    return socket.socket()


@refused
def a_thread():
    """a thread"""
    return threading.Thread(target=print)


@refused
def a_pool():
    """a pool of threads or processes"""
    return concurrent.futures.ThreadPoolExecutor(1)


@refused
def a_process():
    """a process"""
    process = subprocess.Popen(["true"])
    process.wait()
    return process


@refused
def a_generator():
    """a generator"""
    return (i for i in range(3))


@refused
def a_frame():
    """a frame of running code"""
    return sys._getframe()


@refused
def a_context_variable():
    """a context variable ('x')"""
    return contextvars.ContextVar("x")


@refused
def a_held_lock():
    """a lock that is held"""
    lock = threading.Lock()
    lock.acquire()
    return lock


@refused
def a_script():
    """a module of TorchScript"""
    return torch.jit.script(nn.Linear(2, 2))


@refused
def an_odd_object():
    """a lxml (no)"""

    class lxml:
        def __reduce__(self):
            raise OSError("no")

    return lxml()


@refused
def a_buffer_of_a_file():
    """an open file"""
    return io.BufferedReader(io.FileIO("/dev/null"))
