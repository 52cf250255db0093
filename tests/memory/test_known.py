"""The shipped dimensions of known models agree with published numbers."""

import pytest

from qlora_lite.memory.known import known_config, known_models
from qlora_lite.model.config import read_config
from qlora_lite.model.shape import model_shape

PUBLISHED = {
    "openai-community/gpt2": 124_439_808,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


def decoder_parameters(c: dict) -> int:
    """Hand-computed, for a Llama-like decoder with RMSNorms and without biases."""
    hidden, ff = c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim", hidden // c["num_attention_heads"])
    width, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    qk_norms = 2 * head_dim if c["model_type"] == "qwen3" else 0
    layer = 2 * hidden * (width + kv) + 3 * hidden * ff + 2 * hidden + qk_norms
    tables = (1 if c["tie_word_embeddings"] else 2) * c["vocab_size"] * hidden
    return tables + c["num_hidden_layers"] * layer + hidden


def test_the_models_of_the_recipes_are_known_smallest_first():
    assert [known.models[0] for known in known_models()] == list(PUBLISHED)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_dimensions_give_the_published_number_of_parameters(model):
    config = read_config(model, known=known_config(model))
    known = next(k for k in known_models() if model in k.models)
    assert model_shape(config).num_parameters == PUBLISHED[model] == known.num_parameters


@pytest.mark.parametrize("model", list(PUBLISHED)[1:])
def test_arithmetic_by_hand_agrees(model):
    config = known_config(model)
    assert config is not None
    assert decoder_parameters(config) == PUBLISHED[model]


def test_an_instruct_model_has_the_dimensions_of_its_base():
    base, instruct = "mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"
    assert known_config(instruct) == known_config(base)
    assert known_config("meta-llama/Llama-3.1-8B-Instruct") is not None


CONTEXTS = {
    "openai-community/gpt2": 1024,
    "Qwen/Qwen3-0.6B": 40_960,
    "Qwen/Qwen3-0.6B-Base": 32_768,
    "Qwen/Qwen3-8B": 40_960,
    "Qwen/Qwen3-8B-Base": 32_768,
    "mistralai/Mistral-7B-v0.3": 32_768,
    "meta-llama/Llama-3.1-8B": 131_072,
}
"""max_position_embeddings of the published configs."""


@pytest.mark.parametrize("model", CONTEXTS)
def test_the_context_is_the_published_one_and_no_default_of_a_class(model):
    known = known_config(model)
    assert known is not None
    assert {"max_position_embeddings", "n_positions"} & known.keys()
    assert read_config(model, known=known).max_position_embeddings == CONTEXTS[model]


def test_positions_rotate_as_published():
    rope = read_config("m/l", known=known_config("meta-llama/Llama-3.1-8B")).rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("llama3", 500_000, 8)


def test_an_unknown_model_is_none():
    assert known_config("no-owner/no-model") is None
