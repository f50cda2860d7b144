"""Models that a callable builds: the same weights, in files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nbdist
from nbdist.core.task.built_model import built_model
from nbdist.core.task.task import Task
from nbdist.core.transfer.file_memory import extent_of
from nbdist.errors import TaskError

WIDTH = 200


class Tied(nn.Module):
    """An embedding that is the last layer too, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.register_buffer("table", torch.arange(float(WIDTH * WIDTH)), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.embedding(x) @ self.scale))


def build():
    torch.manual_seed(3)
    return Tied()


def saved(tmp_path, model, **changes):
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "last.weight"}
    save_file({name: changes.get(name, value) for name, value in state.items()}, tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def assert_same(model, other):
    for (name, one), (_, expected) in zip(
        [*model.named_parameters(), *model.named_buffers()], [*other.named_parameters(), *other.named_buffers()],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, expected), name
        assert (type(one), one.requires_grad, one.stride()) == (
            type(expected), expected.requires_grad, expected.stride()
        )  # fmt: skip


@pytest.mark.parametrize("from_file", [False, True])
def test_it_has_the_weights_of_a_plain_model_and_they_lie_in_files(tmp_path, from_file):
    expected = build()
    nn.init.normal_(expected.embedding.weight) if from_file else None
    expected.norm.running_mean.fill_(2.0) if from_file else None
    model = built_model(build, saved(tmp_path, expected) if from_file else None, "build")
    assert_same(model, expected)
    assert model.last.weight is model.embedding.weight
    large = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() >= WIDTH * WIDTH]
    assert len(large) == 3
    assert all(extent_of(tensor.untyped_storage()) for tensor in large)


def test_attributes_of_parameters_are_kept(tmp_path):
    def marked():
        model = build()
        model.scale.decays = False
        return model

    assert built_model(marked, saved(tmp_path, build()), "marked").scale.decays is False


def test_weights_are_converted_to_the_models_dtype(tmp_path):
    half = saved(tmp_path, build(), scale=build().scale.detach().half())
    model = built_model(build, half, "build")
    assert model.scale.dtype == torch.float32
    assert torch.equal(model.scale, build().scale.half().float())


def test_the_users_file_is_not_written(tmp_path):
    path = saved(tmp_path, build())
    before = (tmp_path / "w.safetensors").read_bytes()
    model = built_model(build, path, "build")
    assert_same(model, build())
    with torch.no_grad():
        model.scale.zero_()
    assert (tmp_path / "w.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": "no"}, "weights=no does not exist"),
        ({"build": lambda: nn.Linear(2, 2)}, r"lacks weight and 1 more of the model that build\(\) builds"),
        ({"build": lambda: 5}, r"build\(\) returned a value of type int: let it return a torch.nn.Module"),
        ({"build": lambda: {}["x"]}, r"build\(\) raised KeyError: 'x'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(tmp_path, change, sentence):
    path = saved(tmp_path, build())
    with pytest.raises(TaskError, match=sentence):
        built_model(change.get("build", build), change.get("weights", path), "build")


def test_hooks_and_other_references_stay():
    """The parameter is the object that the builder has made."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.weight, self.held = weight, [weight]
            weight.register_hook(lambda gradient: gradient * 0)

        def forward(self, x):
            return x @ self.held[0]

    model = built_model(lambda: Odd(), None, "build")
    assert model.held[0] is model.weight
    model(torch.ones(2, WIDTH)).sum().backward()
    assert model.weight.grad.abs().sum() == 0


def test_tensors_that_share_memory_still_do():
    def transposed():
        torch.manual_seed(1)
        model, weight = nn.Module(), torch.randn(WIDTH, WIDTH)
        model.a, model.b = nn.Parameter(weight), nn.Parameter(weight.t())
        return model

    model = built_model(transposed, None, "build")
    with torch.no_grad():
        model.a[0, 1] = 7.0
    assert model.b[1, 0] == 7.0


def test_memory_that_something_else_holds_is_refused():
    def sharing():
        model = nn.Module()
        model.plain = torch.randn(WIDTH, WIDTH)
        model.register_buffer("table", model.plain[:])
        return model

    with pytest.raises(TaskError, match=r"table of the model that build\(\) builds shares its memory with another"):
        built_model(sharing, None, "build")


def test_a_model_of_small_tensors_is_one_too():
    data = torch.randn(16, 4), torch.randn(16, 1)
    options = {"loss": "mse", "batch_size": 8, "epochs": 1, "verbose": False, "record": False}
    result = nbdist.train(lambda: nn.Linear(4, 1), data, **options)
    assert isinstance(result.model, nn.Linear)


def test_another_shape_is_refused(tmp_path):
    path = saved(tmp_path, build(), scale=torch.ones(3))
    with pytest.raises(TaskError, match=r"scale is of shape \(3,\) in weights=.*, and \(200, 200\) in the model"):
        built_model(build, path, "build")


def test_nothing_is_left_registered_after_an_error():
    with pytest.raises(TaskError):
        built_model(lambda: {}["x"], None, "build")
    assert extent_of(nn.Linear(WIDTH, WIDTH).weight.untyped_storage()) is None


def test_weights_are_for_a_callable():
    data = torch.ones(4, 2), torch.ones(4, 2)
    with pytest.raises(TaskError, match="weights=w is for a model that a callable builds, and model is a model"):
        Task.create(nn.Linear(2, 2), data, loss="mse", weights="w")


def test_a_class_is_no_callable_for_this():
    with pytest.raises(TaskError, match=r"model is a class, not a model: write Tied\(\)"):
        Task.create(Tied, torch.ones(4, 2), loss="mse")


@pytest.mark.parametrize("from_file", [False, True])
def test_one_process_trains_it_as_a_model(tmp_path, from_file):
    data = torch.arange(64) % WIDTH, torch.arange(64) * 7 % WIDTH
    options = {"loss": "cross_entropy", "batch_size": 16, "epochs": 2, "verbose": False, "record": False, "seed": 1}
    own = build()
    weights = saved(tmp_path, own) if from_file else None
    result = nbdist.train(build, data, weights=weights, **options)
    nbdist.train(own, data, **options)
    assert_same(result.model, own)
