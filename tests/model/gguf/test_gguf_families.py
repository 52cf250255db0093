"""Files that are no dense language model of a supported family are refused."""

import gguf
import pytest
import torch

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.families import family_of
from qlora_lite.shards.gguf.header import read_header
from tests.workbench_gguf import tiny_gguf_model, write_model_gguf


@pytest.mark.parametrize("architecture", ["mamba", "t5", "qwen3moe", "deci"])
def test_other_architectures_are_refused_with_the_list(architecture, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseModelError, match=f"'{architecture}'.* llama, granite, qwen2, .*gpt2"):
        family_of(read_header(tmp_path / "model.gguf"))


def test_experts_are_refused(tmp_path):
    experts = {"blk.0.ffn_gate_exps.weight": torch.ones(2, 4, 4)}
    path = write_model_gguf(tmp_path / "model.gguf", tiny_gguf_model("llama"), tensors=experts)
    with pytest.raises(BaseModelError, match=r"has experts .blk\.0\.ffn_gate_exps\.weight"):
        family_of(read_header(path))


def test_an_adapter_is_refused(tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf", tiny_gguf_model("llama"), keys=lambda w: w.add_type("adapter")
    )
    with pytest.raises(BaseModelError, match="is of type 'adapter'"):
        family_of(read_header(path))


def test_a_file_without_an_embedding_is_refused(tmp_path):
    header = read_header(write_model_gguf(tmp_path / "model.gguf", tiny_gguf_model("llama")))
    del header.tensors["token_embd.weight"]
    with pytest.raises(BaseModelError, match=r"has no tensor 'token_embd\.weight'"):
        family_of(header)
