"""The config of a GGUF file equals the one that the file was written from."""

import gguf
import pytest
import torch

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.config import _share, config_from_gguf
from qlora_lite.shards.gguf.header import read_header
from tests.workbench_gguf import ALL_CASES, tiny_gguf_model, write_model_gguf

NOT_IN_THE_FILE = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "max_position_embeddings",  # Bloom has none; the others are compared below
}

DIFFERS = {
    # one class for what llama.cpp calls Llama; only a window would make a difference
    "mistral": {"model_type", "sliding_window", "pretraining_tp", "attention_bias", "mlp_bias"},
    # the file has the width after the adjustment
    "lfm2": {"intermediate_size", "block_auto_adjust_ff_dim", "full_attn_idxs"},
    # one key for all heads is `multi_query`, whatever the number says
    "falcon": {"num_kv_heads"},
    "falcon_untied": {"num_kv_heads"},
}

FURTHER_FIELDS = {"partial_rotary_factor"}
"""Kept next to `rope_parameters`, where it is as well."""


@pytest.mark.parametrize("case", ALL_CASES)
def test_every_field_is_that_of_the_model_in_the_file(case, tmp_path):
    model = tiny_gguf_model(case)
    config = config_from_gguf(read_header(write_model_gguf(tmp_path / "model.gguf", model)))
    expected, found = model.config.to_dict(), config.to_dict()
    ignored = NOT_IN_THE_FILE | DIFFERS.get(case, set()) | FURTHER_FIELDS
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }
    assert config.architectures == [
        "LlamaForCausalLM" if case == "mistral" else type(model).__name__
    ]
    if case != "bloom":
        assert config.max_position_embeddings == model.config.max_position_embeddings


@pytest.mark.parametrize(("case", "num_layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemma_scales_queries_by_the_hidden_size(case, num_layers, tmp_path):
    model = tiny_gguf_model(case, num_hidden_layers=num_layers, hidden_size=96)
    path = write_model_gguf(tmp_path / "model.gguf", model)
    assert config_from_gguf(read_header(path)).query_pre_attn_scalar == 96 // 4


def test_granite_without_multipliers_is_scaled_as_usual(tmp_path):
    multipliers = ("attention_multiplier", "embedding_multiplier", "residual_multiplier")
    model = tiny_gguf_model("granite", **dict.fromkeys(multipliers, 0.0))
    config = config_from_gguf(read_header(write_model_gguf(tmp_path / "model.gguf", model)))
    assert [getattr(config, name) for name in multipliers] == [16**-0.5, 1.0, 1.0]


def test_generation_ends_at_the_end_of_a_turn_as_well(tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("llama"),
        keys=lambda w: (w.add_eot_token_id(7), w.add_eom_token_id(5)),
    )
    assert config_from_gguf(read_header(path)).eos_token_id == [2, 7, 5]


def test_keys_that_only_describe_a_file_are_accepted(tmp_path):
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_string("general.license", "apache-2.0")
        writer.add_array("general.tags", ["text"])
        writer.add_string("tokenizer.chat_template", "{{ messages }}")
        writer.add_uint32("quantize.imatrix.entries_count", 224)
        writer.add_string("mradermacher.quantized_by", "somebody")
        writer.add_tensor_data_layout("Meta AI original pth")

    model = tiny_gguf_model("llama")
    plain = config_from_gguf(read_header(write_model_gguf(tmp_path / "plain.gguf", model)))
    path = write_model_gguf(tmp_path / "described.gguf", model, keys=keys)
    assert config_from_gguf(read_header(path)).to_diff_dict() == plain.to_diff_dict()


@pytest.mark.parametrize(
    ("pattern", "slides"),
    [
        ([True, False, False, True], [True, False, False, True]),
        ([1, 0, 0, 1], [True, False, False, True]),
        (2, [True, False, True, False]),
    ],
)
def test_the_pattern_of_windows_is_read(pattern, slides, tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("gemma3_text", num_hidden_layers=4),
        keys=lambda w: w.add_sliding_window_pattern(pattern),
    )
    types = ["sliding_attention" if x else "full_attention" for x in slides]
    assert config_from_gguf(read_header(path)).layer_types == types


REFUSED = {
    "an unknown key": (
        "llama",
        lambda w: w.add_uint32("llama.attention.unknown_thing", 1),
        {},
        "llama.attention.unknown_thing",
    ),
    "an unknown array": (
        "llama",
        lambda w: w.add_array("llama.unknown_things", [1, 2]),
        {},
        "llama.unknown_things",
    ),
    "a key of another architecture": (
        "llama",
        lambda w: w.add_uint32("qwen2.block_count", 4),
        {},
        "qwen2.block_count",
    ),
    "experts": ("llama", lambda w: w.add_expert_count(8), {}, "llama.expert_count is 8"),
    "attention that is not causal": (
        "llama",
        lambda w: w.add_causal_attention(False),
        {},
        "attention.causal is False",
    ),
    "another number of blocks": (
        "llama",
        lambda w: w.add_block_count(3),
        {},
        "block_count is 3, and 4",
    ),
    "another size": ("llama", lambda w: w.add_embedding_length(32), {}, "embedding_length is 32"),
    "another vocabulary": ("llama", lambda w: w.add_vocab_size(5), {}, "vocab_size is 5"),
    "a text for a number": (
        "llama",
        lambda w: w.add_string("llama.attention.head_count", "four"),
        {},
        "attention.head_count is four",
    ),
    "no heads": (
        "llama",
        lambda w: w.add_head_count(0),
        {},
        "attention.head_count is 0, and a positive integer",
    ),
    "heads that differ between layers": (
        "llama",
        lambda w: w.add_head_count_kv([2, 2, 1, 2]),
        {},
        "the same value for all layers",
    ),
    "an epsilon that is no number": (
        "llama",
        lambda w: w.add_layer_norm_rms_eps(float("nan")),
        {},
        "layer_norm_rms_epsilon is nan",
    ),
    "an epsilon of zero": (
        "llama",
        lambda w: w.add_layer_norm_rms_eps(0.0),
        {},
        "layer_norm_rms_epsilon is 0.0, and a positive number",
    ),
    "more heads than dimensions": (
        "granite",
        lambda w: w.add_head_count(10**9),
        {},
        "attention.head_count is 1000000000",
    ),
    "an embedding of one dimension": (
        "llama",
        None,
        {"token_embd.weight": torch.ones(64)},
        "wider than [64]",
    ),
    "a period of zero": (
        "gemma3_text",
        lambda w: w.add_sliding_window_pattern(0),
        {},
        "sliding_window_pattern is 0",
    ),
    "a pattern of another length": (
        "gemma3_text",
        lambda w: w.add_sliding_window_pattern([True, False]),
        {},
        "is an array of 2, and an array of 6",
    ),
    "layers without a number of heads": (
        "lfm2",
        lambda w: w.add_head_count_kv(2),
        {},
        "attention.head_count_kv is 2, and an array of 4",
    ),
    "rows in another order": (
        "llama",
        lambda w: w.add_tensor_data_layout("another"),
        {},
        "tensor_data_layout is another",
    ),
    "odd heads": (
        "llama",
        lambda w: (
            w.add_key_length(15),
            w.add_value_length(15),
            w.add_rope_dimension_count(15),
        ),
        {},
        "an even number",
    ),
    "values of another width than keys": (
        "llama",
        lambda w: (w.add_key_length(16), w.add_value_length(8)),
        {},
        "attention.value_length is 8, and 16",
    ),
    "a flag that is a number": (
        "stablelm",
        lambda w: w.add_uint32("stablelm.use_parallel_residual", 1),
        {},
        "use_parallel_residual is 1, and true or false",
    ),
    "two epsilons": ("llama", lambda w: w.add_layer_norm_eps(0.1), {}, "one value"),
    "rotation of a part of a head": (
        "llama",
        lambda w: w.add_rope_dimension_count(8),
        {},
        "rope.dimension_count is 8, and 16",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_file_that_is_not_understood_is_refused(why, tmp_path):
    case, keys, tensors, message = REFUSED[why]
    model = tiny_gguf_model(case)
    path = write_model_gguf(tmp_path / "model.gguf", model, keys=keys, tensors=tensors)
    with pytest.raises(BaseModelError) as error:
        config_from_gguf(read_header(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_rotated_share_gives_back_the_number_of_dimensions():
    for head_dim in range(2, 300):
        for rotated in range(2, head_dim + 1, 2):
            assert int(_share(rotated, head_dim) * head_dim) == rotated
