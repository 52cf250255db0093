"""The config of a GGUF file equals the one that the file was written from."""

import gguf
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf_config import config_from_gguf
from qlora_lite.shards.gguf_header import read_header
from tests.workbench_gguf import ALL_CASES, llama3_factors, tiny_gguf_model, write_gguf

NOT_IN_THE_FILE = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "initializer_range",
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
"""Kept beside `rope_parameters`, where it is as well."""


@pytest.mark.parametrize("case", ALL_CASES)
def test_every_field_is_that_of_the_model_in_the_file(case, tmp_path):
    model = tiny_gguf_model(case)
    config = config_from_gguf(read_header(write_gguf(tmp_path / "model.gguf", model)))
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


LONG = [1.0 + 0.5 * i for i in range(8)]
SHORT = [1.0 + 0.01 * i for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "llama3_1": ("llama", LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}),
    "llama3_2": ("llama", LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
    "llama3_short": ("llama", LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 64}),
    "llama3_other": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 5.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 9.0,
            "original_max_position_embeddings": 3000,
        },
    ),
    "granite_llama3": (
        "granite",
        LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
    ),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.5}),
    "gemma3_linear": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "yarn_full": (
        "qwen3",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.25,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
        },
    ),
    "yarn_mscale": (
        "llama",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    ),
    "longrope": (
        "phi3",
        {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_scaling_is_rebuilt(name, theta, tmp_path):
    case, scaling = SCALINGS[name]
    rope = scaling | {"rope_theta": theta}
    layer_type = "full_attention" if case == "gemma3_text" else None
    changes = {"rope_parameters": {layer_type: rope} if layer_type else rope}
    if case == "phi3":
        changes["original_max_position_embeddings"] = 128
    model = tiny_gguf_model(case, **changes)
    config = config_from_gguf(read_header(write_gguf(tmp_path / "model.gguf", model)))
    kind = scaling["rope_type"]
    for length in (16, 400):  # longrope has other factors beyond the original context
        expected, attention = ROPE_INIT_FUNCTIONS[kind](
            model.config, torch.device("cpu"), seq_len=length, layer_type=layer_type
        )
        found, found_attention = ROPE_INIT_FUNCTIONS[kind](
            config, torch.device("cpu"), seq_len=length, layer_type=layer_type
        )
        # factors of llama3 are computed in another order: a few roundings in 32 bits
        tolerance = 2e-6 if kind == "llama3" else 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        assert found_attention == pytest.approx(attention, rel=1e-7)
    if name not in ("llama3_short", "llama3_other"):  # there, other settings have the same effect
        assert config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_settings_of_llama_3_are_found_from_its_factors(head_dim, factor, tmp_path):
    rope = LLAMA3 | {
        "factor": factor,
        "rope_theta": 500_000.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_gguf_model("llama", head_dim=head_dim, rope_parameters=rope)
    config = config_from_gguf(read_header(write_gguf(tmp_path / "model.gguf", model)))
    assert config.rope_parameters == rope


def test_the_settings_of_another_context_are_found_from_enough_factors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 6.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 4096,
    }
    model = tiny_gguf_model("llama", head_dim=128, rope_parameters=rope)
    config = config_from_gguf(read_header(write_gguf(tmp_path / "model.gguf", model)))
    assert config.rope_parameters == rope


def test_factors_of_one_are_no_scaling(tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("llama"),
        tensors={"rope_freqs.weight": torch.ones(8)},
    )
    assert config_from_gguf(read_header(path)).rope_parameters["rope_type"] == "default"


LINEAR = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_theta": 10_000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("rope.scaling.factor", None, LINEAR),  # what llama.cpp assumes
        ("rope.scale_linear", None, LINEAR),
        ("rope.scaling.factor", "linear", LINEAR),
        ("rope.scaling.factor", "none", DEFAULT),
    ],
)
def test_a_factor_without_a_type_is_linear(key, kind, expected, tmp_path):
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_float32(f"llama.{key}", 4.0)
        if kind:
            writer.add_string("llama.rope.scaling.type", kind)

    path = write_gguf(tmp_path / "model.gguf", tiny_gguf_model("llama"), keys=keys)
    assert config_from_gguf(read_header(path)).rope_parameters == expected


def test_generation_ends_at_the_end_of_a_turn_as_well(tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf", tiny_gguf_model("llama"), keys=lambda w: w.add_eot_token_id(7)
    )
    assert config_from_gguf(read_header(path)).eos_token_id == [2, 7]


@pytest.mark.parametrize(
    ("pattern", "slides"),
    [
        ([True, False, False, True], [True, False, False, True]),
        ([1, 0, 0, 1], [True, False, False, True]),
        (2, [True, False, True, False]),
    ],
)
def test_the_pattern_of_windows_is_read(pattern, slides, tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("gemma3_text", num_hidden_layers=4),
        keys=lambda w: w.add_sliding_window_pattern(pattern),
    )
    types = ["sliding_attention" if x else "full_attention" for x in slides]
    assert config_from_gguf(read_header(path)).layer_types == types


WITH_FACTORS = {"rope_freqs.weight": torch.linspace(1, 8, 8)}
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
    "tensors of experts": (
        "llama",
        None,
        {"blk.0.ffn_gate_exps.weight": torch.ones(2, 4, 4)},
        "has experts",
    ),
    "an adapter": ("llama", lambda w: w.add_type("adapter"), {}, "'adapter'"),
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
    "a base of zero": ("llama", lambda w: w.add_rope_freq_base(0.0), {}, "rope.freq_base is 0.0"),
    "a negative factor": (
        "llama",
        lambda w: w.add_rope_scaling_factor(-2.0),
        {},
        "rope.scaling.factor is -2.0",
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
    "scaling of another kind": (
        "llama",
        lambda w: w.add_string("llama.rope.scaling.type", "ntk"),
        {},
        "none, linear, yarn or longrope",
    ),
    "longrope without factors": (
        "llama",
        lambda w: w.add_string("llama.rope.scaling.type", "longrope"),
        {},
        "rope_factors_long.weight",
    ),
    "yarn that is not whole": (
        "llama",
        lambda w: (
            w.add_string("llama.rope.scaling.type", "yarn"),
            w.add_rope_scaling_factor(4.0),
            w.add_rope_scaling_yarn_ext_factor(0.5),
        ),
        {},
        "yarn_ext_factor is 0.5",
    ),
    "factors of no known scaling": ("llama", None, WITH_FACTORS, "rope_freqs.weight does not"),
    "factors and a scaling": (
        "llama",
        lambda w: w.add_float32("llama.rope.scaling.factor", 2.0),
        WITH_FACTORS,
        "not known together",
    ),
    "long factors alone": (
        "phi3",
        None,
        {"rope_factors_long.weight": torch.ones(8)},
        "not known together",
    ),
    "factors of another number": (
        "llama",
        None,
        {"rope_freqs.weight": torch.ones(4)},
        "8 positive numbers",
    ),
    "factors of zero": ("llama", None, {"rope_freqs.weight": torch.zeros(8)}, "8 positive numbers"),
    "factors without a rotation": ("gpt2", None, WITH_FACTORS, "no rotary embedding"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_file_that_is_not_understood_is_refused(why, tmp_path):
    case, keys, tensors, message = REFUSED[why]
    model = tiny_gguf_model(case)
    path = write_gguf(tmp_path / "model.gguf", model, keys=keys, tensors=tensors)
    with pytest.raises(BaseModelError) as error:
        config_from_gguf(read_header(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("architecture", ["mamba", "t5", "qwen3moe", "deci"])
def test_other_architectures_are_refused_with_the_list(architecture, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseModelError, match=f"'{architecture}'.* llama, granite, qwen2, .*gpt2"):
        config_from_gguf(read_header(tmp_path / "model.gguf"))


def test_the_factors_of_the_test_follow_from_the_settings():
    """The test's own formula, on numbers computed by hand: the wavelengths are 2 pi and 20 pi."""
    rope = {"rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = llama3_factors(rope | {"original_max_position_embeddings": 100}, 4)
    smooth = (100 / (20 * torch.pi) - 1) / 3
    assert factors.tolist() == pytest.approx([1.0, 1 / ((1 - smooth) / 4 + smooth)])
