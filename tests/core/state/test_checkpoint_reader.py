"""The checkpoint reader: a checkpoint is loaded completely or refused, whatever was changed in it."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import warnings
from pathlib import Path

import pytest
import torch
from problems import ADAMW, assert_same_bits, mlp, weights
from safetensors import safe_open
from safetensors.torch import save_file
from saved_checkpoints import fused, keep, loaded, net, newest, over, reseal

import nbdist
from nbdist.core.state.checkpoint_reader import MANIFEST, NEWEST, CheckpointReader, checkpoints, sealed
from nbdist.errors import PlanError, TaskError

FILE = "rank0.safetensors"


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, of steps 2 and 3."""
    keep(tmp_path, net(), fused, steps=2)
    keep(tmp_path, net(), fused, steps=3)
    return tmp_path


def steps_of(folder):
    """The step that is loaded from a folder of several; None if none is. An older one comes with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step = CheckpointReader.in_folder(str(folder)).ranks[0]["position"]["step"]
        except PlanError:
            return None
    assert (step == 2) == any("The one before it is taken" in str(warning.message) for warning in caught)
    return step


def damaged(content, sample):
    """A file with a byte changed, and truncated, at `sample` places; at every byte for None."""
    places = range(len(content)) if sample is None else sorted({*range(0, len(content), len(content) // sample)})
    for place in places:
        yield content[:place]
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield content[:-1]
    yield content + b" "


@pytest.mark.parametrize("name", [FILE, "rank0-frozen.safetensors", MANIFEST])
def test_a_changed_byte_is_detected(two, name):
    """Truncated or changed anywhere, a checkpoint is never loaded; the one before it is."""
    assert 3 == steps_of(two)
    file = newest(two) / name
    content = file.read_bytes()
    for changed in damaged(content, None if name == MANIFEST else 40):
        file.write_bytes(changed)
        assert 2 == steps_of(two)
        with pytest.raises(PlanError, match=r"is not whole|not written by nbdist|has format"):
            CheckpointReader.in_folder(str(file.parent))
    file.unlink()
    assert 2 == steps_of(two)
    file.write_bytes(content)
    assert 3 == steps_of(two)


def test_a_changed_newest_json_is_refused(two):
    """At any of its bytes, since it names the newest checkpoint."""
    content = (two / NEWEST).read_bytes()
    for changed in damaged(content, None):
        (two / NEWEST).write_bytes(changed)
        assert steps_of(two) is None
    (two / NEWEST).write_bytes(content)
    assert 3 == steps_of(two)


def test_if_all_are_damaged_the_error_is_of_the_oldest(two):
    """With a warning for each newer one, but none for the oldest."""
    for name in checkpoints(two):
        (two / name / FILE).unlink()
    with pytest.warns(UserWarning, match="step00000003.* is not there"), pytest.raises(PlanError, match="step00000002"):
        CheckpointReader.in_folder(str(two))


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return Path.write_text, (Path(self.trace), "caught")


def offsets(content, change):
    header, data = header_of(content)
    name = next(key for key in header if key.startswith("first.weight||"))
    header[name]["data_offsets"] = [number + change for number in header[name]["data_offsets"]]
    return with_header(header, data)


HOSTILE_FILES = {
    "a pickle": lambda content, trace: pickle.dumps(Trap(trace)),
    "a pickle in a header": lambda content, trace: struct.pack("<Q", 80) + pickle.dumps(Trap(trace)).ljust(100),
    "another file": lambda content, trace: Path(__file__).read_bytes(),
    "nothing": lambda content, trace: b"",
    "offsets behind the end": lambda content, trace: offsets(content, 10**9),
    "offsets that overlap": lambda content, trace: offsets(content, -8),
    "offsets below zero": lambda content, trace: offsets(content, -(10**9)),
    "a header of 2**60 bytes": lambda content, trace: struct.pack("<Q", 2**60) + content[8:],
    "a header of 2**64 bytes": lambda content, trace: b"\xff" * 8 + content[8:],
    "a header that is no JSON": lambda content, trace: content[:8] + b"\x80" * (len(content) - 8),
    "a header that is deep": lambda content, trace: struct.pack("<Q", 10**5) + b"[" * 10**5,
}


@pytest.mark.parametrize("what", HOSTILE_FILES)
def test_a_file_that_nbdist_did_not_write(tmp_path, what):
    """With the right checksum: it is refused, no code runs, and the model stays as it is."""
    keep(tmp_path, net(), fused)
    place = newest(tmp_path)
    (place / FILE).write_bytes(HOSTILE_FILES[what]((place / FILE).read_bytes(), tmp_path / "trace"))
    reseal(place)
    model = net()
    before = weights(model)
    with pytest.raises(PlanError, match=r"is not whole, rank0.safetensors cannot be read"):
        nbdist.load_checkpoint(str(tmp_path), model)
    assert_same_bits(before, weights(model))
    assert not (tmp_path / "trace").exists()


TEXTS = [
    "", "{", "null", "[]", '"text"', "3", "[" * 10**5, "9" * 10**5, "{}", '{"format": 3}', '{"format": [2]}',
    sealed({"format": 3}), sealed({"format": 3, "files": []}), sealed({"format": 3, "files": {}}),
    sealed({"format": 3, "files": {FILE: 3}}), sealed({"format": 3, "files": {FILE: []}}),
    sealed({"format": 3, "files": {"..": [1, ""]}}), sealed({"format": 3, "files": {"": [1, ""]}}),
    sealed({"format": 3, "files": {"a\0b": [1, ""]}}), sealed({"checkpoints": []}), sealed({"checkpoints": 3}),
    sealed({"checkpoints": [3]}), sealed({"checkpoints": [".."]}), sealed({"checkpoints": [""]}),
]  # fmt: skip


@pytest.mark.parametrize("name", [MANIFEST, NEWEST])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_json_of_any_kind(tmp_path, name, text):
    """Sealed or not, it is refused with a clear error."""
    keep(tmp_path, mlp(), "sgd")
    place = newest(tmp_path) if name == MANIFEST else tmp_path
    (place / name).write_text(text)
    with pytest.raises(PlanError, match=r"not written by nbdist|is not whole|holds no checkpoint|has format \["):
        CheckpointReader.in_folder(str(tmp_path))


def test_another_format_is_named(tmp_path):
    """Such as that of a later nbdist."""
    keep(tmp_path, mlp(), "sgd")
    place = newest(tmp_path)
    (place / MANIFEST).write_text(json.dumps({"format": 99, "more": {}}))
    with pytest.raises(PlanError, match="has format 99: this nbdist reads formats 2 and 3"):
        CheckpointReader.in_folder(str(place))


@pytest.mark.parametrize("kind", ["files", "checkpoints"])
@pytest.mark.parametrize("way", ["../{}", "inside/../../{}", "{absolute}"])
def test_nothing_outside_the_folder_is_read(tmp_path, kind, way):
    """A name that leads out of it is refused, even if the checkpoint there is intact."""
    keep(tmp_path / "good", mlp(), "sgd")
    keep(tmp_path / "bad", mlp(), "sgd")
    outside, bad = newest(tmp_path / "good"), newest(tmp_path / "bad")
    if kind == "files":
        outside = outside / FILE
        saved_state = json.loads((bad / MANIFEST).read_text())["files"][FILE]
        name = way.format(f"../good/{outside.parent.name}/{FILE}", absolute=outside)
        (bad / MANIFEST).write_text(sealed({"format": 3, "files": {name: saved_state}}))
    else:
        name = way.format(f"good/{outside.name}", absolute=outside)
        (tmp_path / "bad" / NEWEST).write_text(sealed({"checkpoints": [name]}))
    with pytest.raises(PlanError, match="not written by nbdist"):
        CheckpointReader.in_folder(str(tmp_path / "bad"))


def rewritten(place, change):
    """Change rank 0's metadata or tensors, and write both again."""
    with safe_open(place / FILE, framework="pt") as file:
        saved_state = json.loads(file.metadata()["nbdist"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    change(saved_state, tensors)
    save_file(tensors, place / FILE, metadata={"nbdist": json.dumps(saved_state)})
    reseal(place)


def put(*path):
    """A change of the metadata: the path of keys, then the new value."""

    def change(saved_state, _tensors):
        *way, name, value = path
        for step in way:
            saved_state = saved_state[step]
        saved_state[name] = value

    return change


HOSTILE_TELLING = {
    "no rank": lambda saved_state, _: saved_state.clear(),
    "another rank": put("rank", 5),
    "a rank in words": put("rank", "0"),
    "a position below zero": put("position", "step", -1),
    "a position in words": put("position", "epoch", "1"),
    "rows that are none": put("position", "history", [3]),
    "half a loss": put("position", "row", "loss", [1.0]),
    "another mesh": put("mesh", 3),
    "a plan without a seed": put("plan", {}),
    "groups that are none": put("optimizers", "", "groups", None),
    "groups of no parameters": put("optimizers", "", "groups", [{}]),
    "values that are none": put("values", [1]),
    "tensors that are none": put("tensors", []),
    "a shape below zero": put("tensors", "first.weight", "shape", [-8, 6]),
    "a shape of words": put("tensors", "first.weight", "shape", ["a"]),
    "a dtype that is code": put("tensors", "first.weight", "dtype", "load"),
    "a cut of a dim that is not there": put("tensors", "first.weight", "cut", {"dim": 7, "sections": [8]}),
    "a cut that does not add up": put("tensors", "first.weight", "cut", {"dim": 0, "sections": [9]}),
    "no ranks to cut over": put("tensors", "first.weight", "tp", 0),
    "no optimizers": lambda saved_state, _: saved_state.pop("optimizers"),
    "attributes that are none": put("optimizers", "", "attributes", []),
    "schedulers that are missing": lambda saved_state, _: saved_state.pop("schedulers"),
    "a tensor of nothing": lambda _, tensors: tensors.update({"other||whole|0|0": torch.zeros(1)}),
    "a key of another form": lambda _, tensors: tensors.update({"first.weight": torch.zeros(1)}),
    "another shape than recorded": lambda _, tensors: tensors.update({"first.weight||whole|0|0": torch.zeros(3)}),
    "one part of a billion": lambda saved_state, tensors: (
        saved_state["tensors"]["first.weight"].update(shard=10**9),
        tensors.update({"first.weight||part|0|0": torch.zeros(1)}),
        tensors.pop("first.weight||whole|0|0"),
    ),
}


@pytest.mark.parametrize("what", HOSTILE_TELLING)
def test_malformed_metadata(tmp_path, what):
    """Of a rank or of its tensors: refused, and nothing changes."""
    keep(tmp_path, net(), fused)
    rewritten(newest(tmp_path), HOSTILE_TELLING[what])
    model = net()
    before = weights(model)
    with pytest.raises(PlanError, match=r"was not written by nbdist: .* is malformed"):
        nbdist.load_checkpoint(str(tmp_path), model, over(fused, model))
    assert_same_bits(before, weights(model))


def test_a_file_without_metadata(tmp_path):
    """All tensors, but no rank's metadata."""
    keep(tmp_path, mlp(), "sgd")
    save_file({"0.weight||whole|0|0": torch.zeros(8, 6)}, newest(tmp_path) / FILE)
    reseal(newest(tmp_path))
    with pytest.raises(PlanError, match="the metadata of a rank is malformed"):
        CheckpointReader.in_folder(str(tmp_path))


def test_missing_values(tmp_path):
    """A parameter in the metadata without values is reported before the others are loaded."""
    keep(tmp_path, net(), fused)
    for begin in ("last.bias||", "last.bias"):  # with and without a state that is there
        rewritten(newest(tmp_path), lambda _, ts: [ts.pop(key) for key in [*ts] if key.startswith(begin)])  # noqa: B023
        with pytest.raises(TaskError, match=r"is not whole: the values of last.bias are not in it"):
            loaded(tmp_path, fused)


def test_settings_of_another_kind(tmp_path):
    """They would fail in the first step, with an error that does not mention the checkpoint."""
    keep(tmp_path, net(), fused)
    for key, value in [("lr", "fast"), ("lr", None), ("betas", [0.9]), ("betas", ["a", "b"]), ("foreach", 3.5)]:
        rewritten(newest(tmp_path), put("optimizers", "", "groups", 0, key, value))
        if key == "foreach":  # a fresh None may take anything
            loaded(tmp_path, fused)
            continue
        with pytest.raises(TaskError, match=f"has {key}=.*, where the optimizer has {key}=.*: build the optimizer as"):
            loaded(tmp_path, fused)
        rewritten(newest(tmp_path), put("optimizers", "", "groups", 0, key, {"lr": 0.01, "betas": [0.9, 0.999]}[key]))


def as_format_2(saved_state, _tensors):
    """The metadata as they were when a run had one optimizer and one scheduler, without names."""
    saved_state |= saved_state.pop("optimizers")[""]
    saved_state["scheduler"] = saved_state.pop("schedulers").get("")


@pytest.mark.parametrize("scheduler", [None, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2)])
def test_format_2_is_read(tmp_path, scheduler):
    """A run resumes from it with the bits of an undisturbed one."""
    options = {"optimizer": ADAMW, "lr_scheduler": scheduler, "batch_size": 8}
    _, expected = keep(tmp_path / "whole", mlp(), steps=4, **options)
    keep(tmp_path / "old", mlp(), steps=3, **options)
    place = newest(tmp_path / "old")
    rewritten(place, as_format_2)
    files = json.loads((place / MANIFEST).read_text())["files"]
    (place / MANIFEST).write_text(sealed({"format": 2, "files": files}))
    _, actual = keep(tmp_path / "new", mlp(), steps=4, resume=str(tmp_path / "old"), **options)
    assert_same_bits(expected, actual)
