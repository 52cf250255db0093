"""Tensors and slices against the loader of safetensors, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.reader import SafetensorsCheckpoint
from tests.tiny import save_tiny


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_is_read_as_the_library_reads_it(tmp_path, num_shards):
    directory = save_tiny(tmp_path / "m", "llama", dtype=torch.bfloat16, num_shards=num_shards)
    expected = {}
    for file in directory.glob("*.safetensors"):
        expected |= load_file(file)
    checkpoint = SafetensorsCheckpoint.open(directory)
    assert sorted(checkpoint.names) == sorted(expected)
    assert len(checkpoint.files) == num_shards
    for name, tensor in expected.items():
        info = checkpoint.info(name)
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert info.num_bytes == tensor.numel() * tensor.element_size()
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.num_bytes == sum(t.numel() * t.element_size() for t in expected.values())


def test_rows_and_columns_are_slices_of_the_tensor(tmp_path):
    tensor = torch.randn(6, 9)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path)
    assert torch.equal(checkpoint.rows("w", 2, 5), tensor[2:5])
    assert torch.equal(checkpoint.columns("w", 3, 9), tensor[:, 3:9])


def test_names_come_in_the_order_of_their_bytes(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64)}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    assert SafetensorsCheckpoint.open(tmp_path).names == ["b", "a"]


def test_reading_after_close_opens_the_file_again(tiny_llama):
    checkpoint = SafetensorsCheckpoint.open(tiny_llama)
    name = checkpoint.names[0]
    before = checkpoint.read(name).clone()
    checkpoint.close()
    assert torch.equal(checkpoint.read(name), before)


def test_the_fingerprint_depends_on_the_content_and_not_on_the_directory(tmp_path):
    def fingerprint(directory, seed):
        return SafetensorsCheckpoint.open(save_tiny(directory, "llama", seed=seed)).fingerprint

    assert fingerprint(tmp_path / "a", 0) == fingerprint(tmp_path / "b", 0)
    assert fingerprint(tmp_path / "c", 1) != fingerprint(tmp_path / "a", 0)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin.*can run code.*safetensors"):
        SafetensorsCheckpoint.open(tmp_path)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"neither model\.safetensors nor"):
        SafetensorsCheckpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    directory = save_tiny(tmp_path / "m", "llama", num_shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BaseModelError, match="has no model-00002-of-00003"):
        SafetensorsCheckpoint.open(directory)


def test_a_truncated_file_is_named(tmp_path):
    directory = save_tiny(tmp_path / "m", "llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"model\.safetensors is damaged"):
        SafetensorsCheckpoint.open(directory)


def test_an_unknown_tensor_is_named(tiny_llama):
    with pytest.raises(BaseModelError, match="no tensor 'nowhere'"):
        SafetensorsCheckpoint.open(tiny_llama).read("nowhere")


def test_an_index_may_assign_tensors_to_any_file(tmp_path):
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert SafetensorsCheckpoint.open(tmp_path).names == ["a", "b"]
