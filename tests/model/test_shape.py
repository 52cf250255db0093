"""A model's dimensions and parameters, from its config only."""

import json

import pytest
from transformers import (
    CohereConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.config import read_config
from qlora_lite.model.shape import model_shape

TINY_LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)


def test_the_parameters_of_a_llama():
    found = {p.name: (p.shape, p.role, p.block) for p in model_shape(TINY_LLAMA).parameters}
    first_layer = {name: value for name, value in found.items() if ".1." not in name}
    assert first_layer == {
        "model.embed_tokens.weight": ((50, 16), "embedding", None),
        "model.layers.0.self_attn.q_proj.weight": ((16, 16), "linear", 0),
        "model.layers.0.self_attn.k_proj.weight": ((8, 16), "linear", 0),
        "model.layers.0.self_attn.v_proj.weight": ((8, 16), "linear", 0),
        "model.layers.0.self_attn.o_proj.weight": ((16, 16), "linear", 0),
        "model.layers.0.mlp.gate_proj.weight": ((24, 16), "linear", 0),
        "model.layers.0.mlp.up_proj.weight": ((24, 16), "linear", 0),
        "model.layers.0.mlp.down_proj.weight": ((16, 24), "linear", 0),
        "model.layers.0.input_layernorm.weight": ((16,), "norm", 0),
        "model.layers.0.post_attention_layernorm.weight": ((16,), "norm", 0),
        "model.norm.weight": ((16,), "norm", None),
        "lm_head.weight": ((50, 16), "head", None),
    }
    assert len(found) == len(first_layer) + 9


def test_gpt2_is_tied_transposed_and_has_biases():
    shape = model_shape(GPT2)
    by_name = {p.name: p for p in shape.parameters}
    assert by_name["lm_head.weight"].tied_to == "transformer.wte.weight"
    assert by_name["transformer.wpe.weight"].role == "embedding"
    fused = by_name["transformer.h.0.attn.c_attn.weight"]
    assert (fused.shape, fused.d_in, fused.d_out) == ((16, 48), 16, 48)
    assert by_name["transformer.h.0.attn.c_attn.bias"].role == "bias"
    assert by_name["transformer.h.0.ln_1.bias"].role == "norm"
    assert shape.is_tied
    assert not model_shape(TINY_LLAMA).is_tied


@pytest.mark.parametrize(
    ("config", "kv_heads", "head_dim", "ff", "gated"),
    [
        (TINY_LLAMA, 2, 4, 24, True),
        (GPT2, 2, 8, 64, False),
        (Phi3Config(num_hidden_layers=1), 32, 96, 8192, True),
        (GPTNeoXConfig(num_hidden_layers=1), 64, 96, 24576, False),
        (OPTConfig(num_hidden_layers=1), 12, 64, 3072, False),
        (Qwen3Config(num_hidden_layers=1, head_dim=128), 32, 128, 22016, True),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_dimensions_are_read_from_the_modules(config, kv_heads, head_dim, ff, gated):
    shape = model_shape(config)
    assert (shape.kv_heads, shape.head_dim, shape.ff, shape.gated) == (
        kv_heads,
        head_dim,
        ff,
        gated,
    )
    assert shape.qk_norm == (config.model_type == "qwen3")
    assert shape.layer_norm == (config.model_type in {"gpt2", "gpt_neox", "opt"})


def test_tied_weights_are_counted_once():
    tied = LlamaConfig(**{**TINY_LLAMA.to_dict(), "tie_word_embeddings": True})
    assert model_shape(TINY_LLAMA).num_parameters - model_shape(tied).num_parameters == 50 * 16


def test_a_norm_is_recognised_by_its_vectors_not_by_its_name():
    """Cohere's norm of queries has a row per head, so it is loaded like other weights."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = CohereConfig(**sizes, num_attention_heads=4, use_qk_norm=True)
    roles = {p.module: p.role for p in model_shape(config).parameters}
    assert roles["model.layers.0.self_attn.q_norm"] == "other"
    assert roles["model.layers.0.input_layernorm"] == roles["model.norm"] == "norm"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ({"model_type": "no-such-architecture"}, "newer transformers"),
        ({"model_type": "t5"}, "causal language model"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}, "trust_remote_code=true"),
    ],
)
def test_a_directory_that_cannot_be_a_base_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=message):
        model_shape(read_config(str(tmp_path)))
