"""Where the tensors of safetensors files lie."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from nbdist.core.transfer.safetensors_files import stored_tensors
from nbdist.errors import TaskError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_every_dtype_is_read(tmp_path):
    tensors = {str(dtype): (torch.arange(12) % 5).view(3, 4).to(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    stored = stored_tensors(str(tmp_path / "w.safetensors"))
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        mapped = stored[name].mapped()
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mapped.float(), tensor.float())


def test_the_files_of_a_folder_are_one(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    assert {name: one.mapped().tolist() for name, one in stored_tensors(str(tmp_path)).items()} == {
        "a": [1, 1], "b": [0, 0, 0],
    }  # fmt: skip


def test_a_name_in_two_files_is_refused(tmp_path):
    for file in ("one", "other"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(TaskError, match="has a in more than one file"):
        stored_tensors(str(tmp_path))


def test_no_file_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"nowhere does not exist"):
        stored_tensors(str(tmp_path / "nowhere"))
    with pytest.raises(TaskError, match=r"holds no safetensors file"):
        stored_tensors(str(tmp_path))


def test_another_file_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "w.safetensors")
    with pytest.raises(TaskError, match=r"w.safetensors is no safetensors file"):
        stored_tensors(str(tmp_path))


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TaskError, match=r"was the download cut off"):
        stored_tensors(str(file))
