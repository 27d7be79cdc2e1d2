"""Weights files: what a mapped file gives, costs and leaves alone."""

import os
import pathlib
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanodiff.formats.weights import read_safetensors, write_folder, write_weights


@pytest.fixture
def file(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(3, i % 4 + 1, generator=draw) for i in range(300)}
    tensors |= {"half": torch.randn(7, generator=draw).half(), "none": torch.empty(0, 4), "bytes": torch.arange(
        5, dtype=torch.uint8), "number": torch.tensor(3, dtype=torch.int64)}  # odd sizes leave later ones unaligned
    save_file(tensors, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def test_every_tensor_is_the_one_that_was_written(file):
    ours, theirs = read_safetensors(file), load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_writing_into_a_tensor_leaves_the_file_and_the_other_tensors_alone(file):
    before = file.read_bytes()
    tensors = read_safetensors(file)
    others = {name: tensor.clone() for name, tensor in tensors.items() if name != "layer.7"}
    tensors["layer.7"].fill_(5)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in others.items())
    del tensors
    assert file.read_bytes() == before


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").is_dir(), reason="counts open files where Linux lists them")
def test_a_file_of_many_tensors_is_opened_once(file):
    before = len(os.listdir("/proc/self/fd"))
    tensors = read_safetensors(file)
    assert len(os.listdir("/proc/self/fd")) - before <= 1 and len(tensors) == 304


def test_what_is_written_may_be_read_by_the_others_of_a_machine(tmp_path):
    """safetensors makes files that their owner alone may read: a folder of shared weights would be closed to all."""
    write_weights(tmp_path / "one.safetensors", {"a": torch.zeros(3)})
    write_folder(tmp_path / "folder", {"config.json": {}}, {"two.safetensors": {"a": torch.zeros(3)}})
    for file in ("one.safetensors", "folder/two.safetensors", "folder/config.json"):
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) & 0o444 == 0o444, file
