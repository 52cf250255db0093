"""Every parameter of a model comes from one tensor of its GGUF file, with its values."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.config import config_from_gguf
from qlora_lite.model.gguf.names import tensor_sources
from qlora_lite.model.shape import build_on_meta, model_shape
from qlora_lite.shards.gguf.checkpoint import GgufCheckpoint, TensorSource
from qlora_lite.shards.gguf.header import read_header
from tests.workbench_gguf import ALL_CASES, tiny_gguf_model, write_model_gguf

UNKNOWN_TO_TRANSFORMERS = {
    "granite": "not supported",
    "gemma": "not supported",
    "cohere": "not supported",
    "cohere_normed": "not supported",
    "cohere2": "not supported",
    "llama_biased": "no biases",
    "qwen3_narrow_heads": "always heads of 128",
    "nemotron_biased": "no biases",
    "starcoder2_unbiased": "always biases",
    "phi3_partial": "no partial rotation",
    "falcon_untied": "always a tied head",
    "falcon_11b": "no groups of keys",
    "falcon_40b": "no groups of keys",
}
"""Where transformers reads another model, or none: its tensors are no oracle."""


def _sources(path: Path) -> tuple[PretrainedConfig, dict[str, TensorSource]]:
    header = read_header(path)
    config = config_from_gguf(header)
    parameters = {p.name: p.shape for p in model_shape(config).parameters}
    return config, tensor_sources(header, config, parameters)


def _tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = GgufCheckpoint(read_header(path), _sources(path)[1])
    return {name: checkpoint.read(name) for name in checkpoint.names}


@pytest.mark.parametrize("case", ALL_CASES)
def test_tensors_and_logits_are_those_of_the_model_in_the_file(case, tmp_path):
    model = tiny_gguf_model(case)
    path = write_model_gguf(tmp_path / "model.gguf", model)
    tensors = _tensors(path)
    expected = dict(model.named_parameters())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    rebuilt = AutoModelForCausalLM.from_config(_sources(path)[0]).float().eval()
    rebuilt.load_state_dict(tensors, strict=False)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt(ids).logits, model(ids).logits)
    if case not in UNKNOWN_TO_TRANSFORMERS:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("case", ALL_CASES)
def test_the_names_are_those_of_transformers(case, tmp_path):
    path = write_model_gguf(tmp_path / "model.gguf", tiny_gguf_model(case))
    config, sources = _sources(path)
    if config.model_type in ("gemma", "granite", "cohere2"):
        pytest.skip("transformers does not read this family")
    theirs = get_gguf_hf_weights_map(build_on_meta(config), TensorProcessor())
    assert {source.stored: name for name, source in sources.items()} == {
        stored: name for stored, name in theirs.items() if name in sources
    }


def _refusal(path: Path) -> str:
    with pytest.raises(BaseModelError) as error:
        _sources(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_tensor_that_the_model_does_not_have_is_refused(tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("llama"),
        tensors={"blk.0.attn_unknown.weight": torch.ones(4)},
    )
    assert "'blk.0.attn_unknown.weight'" in _refusal(path)


def test_a_bias_that_the_family_does_not_have_is_refused(tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("qwen2"),
        tensors={"blk.0.attn_output.bias": torch.ones(64)},
    )
    assert "'blk.0.attn_output.bias'" in _refusal(path)


def test_a_missing_tensor_is_named(tmp_path):
    header = read_header(write_model_gguf(tmp_path / "model.gguf", tiny_gguf_model("llama")))
    config = config_from_gguf(header)
    parameters = {p.name: p.shape for p in model_shape(config).parameters}
    del header.tensors["blk.2.ffn_up.weight"]
    with pytest.raises(BaseModelError, match=r"has no tensor 'blk\.2\.ffn_up\.weight'"):
        tensor_sources(header, config, parameters)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("llama"),
        tensors={"blk.1.attn_k.weight": torch.ones(16, 64)},
    )
    message = _refusal(path)
    assert "blk.1.attn_k.weight has the shape [16, 64]" in message
    assert "[32, 64]" in message


def test_a_head_without_a_tensor_is_the_embedding(tmp_path):
    tied = write_model_gguf(tmp_path / "tied.gguf", tiny_gguf_model("llama_biased"))
    untied = write_model_gguf(tmp_path / "untied.gguf", tiny_gguf_model("llama"))
    assert "lm_head.weight" not in _sources(tied)[1]
    assert _sources(untied)[1]["lm_head.weight"].stored == "output.weight"


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("real_base", marks=pytest.mark.real),
        pytest.param("gemma_gguf", marks=pytest.mark.slow),
    ],
)
def test_config_and_tensors_of_a_real_file_are_those_of_transformers(file, request):
    path = request.getfixturevalue(file)
    config, _ = _sources(path)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=build_on_meta(config))
    tensors, expected = _tensors(path), theirs["tensors"]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    found, expected = config.to_dict(), AutoConfig.for_model(**theirs["config"]).to_dict()
    epsilon = found.pop("rms_norm_eps")  # theirs is not rounded to the shortest decimal
    assert epsilon == pytest.approx(expected["rms_norm_eps"], rel=1e-7)
    for field in found.keys() - {"_name_or_path", "architectures", "_sliding_window_pattern"}:
        assert found[field] == expected[field], field
