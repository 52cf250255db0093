"""The position encoding of a GGUF file is that of the model that it was written from."""

import gguf
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.config import config_from_gguf
from qlora_lite.shards.gguf.header import read_header
from tests.workbench_gguf import llama3_factors, tiny_gguf_model, write_model_gguf

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
    config = config_from_gguf(read_header(write_model_gguf(tmp_path / "model.gguf", model)))
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
    config = config_from_gguf(read_header(write_model_gguf(tmp_path / "model.gguf", model)))
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
    config = config_from_gguf(read_header(write_model_gguf(tmp_path / "model.gguf", model)))
    assert config.rope_parameters == rope


def test_factors_of_one_are_no_scaling(tmp_path):
    path = write_model_gguf(
        tmp_path / "model.gguf",
        tiny_gguf_model("llama"),
        tensors={"rope_freqs.weight": torch.ones(8)},
    )
    assert config_from_gguf(read_header(path)).rope_parameters["rope_type"] == "default"


def test_another_attention_factor_is_kept(tmp_path):
    rope = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}
    model = tiny_gguf_model("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    path = write_model_gguf(
        tmp_path / "model.gguf", model, keys=lambda w: w.add_rope_scaling_attn_factors(1.5)
    )
    assert config_from_gguf(read_header(path)).rope_parameters["attention_factor"] == 1.5


def test_an_original_context_of_one_has_no_attention_factor(tmp_path):
    rope = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}
    model = tiny_gguf_model("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    path = write_model_gguf(
        tmp_path / "model.gguf",
        model,
        keys=lambda w: (w.add_rope_scaling_orig_ctx_len(1), w.add_rope_scaling_attn_factors(1.0)),
    )
    assert "attention_factor" not in config_from_gguf(read_header(path)).rope_parameters


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

    path = write_model_gguf(tmp_path / "model.gguf", tiny_gguf_model("llama"), keys=keys)
    assert config_from_gguf(read_header(path)).rope_parameters == expected


WITH_FACTORS = {"rope_freqs.weight": torch.linspace(1, 8, 8)}
REFUSED = {
    "a base of zero": ("llama", lambda w: w.add_rope_freq_base(0.0), {}, "rope.freq_base is 0.0"),
    "a negative factor": (
        "llama",
        lambda w: w.add_rope_scaling_factor(-2.0),
        {},
        "rope.scaling.factor is -2.0",
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
    "yarn with the factor of longrope": (
        "llama",
        lambda w: (
            w.add_string("llama.rope.scaling.type", "yarn"),
            w.add_rope_scaling_factor(4.0),
            w.add_rope_scaling_attn_factors(1.5),
        ),
        {},
        "rope.scaling.attn_factor is 1.5",
    ),
    "factors where all frequencies are one": (
        "llama",
        lambda w: w.add_rope_freq_base(1.0),
        WITH_FACTORS,
        "rope_freqs.weight does not",
    ),
    "factors that fall": (
        "llama",
        None,
        {"rope_freqs.weight": torch.linspace(8, 1, 8)},
        "rope_freqs.weight does not",
    ),
    "factors below one": (
        "llama",
        None,
        {"rope_freqs.weight": torch.full((8,), 0.5)},
        "rope_freqs.weight does not",
    ),
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
def test_an_encoding_that_is_not_understood_is_refused(why, tmp_path):
    case, keys, tensors, message = REFUSED[why]
    model = tiny_gguf_model(case)
    path = write_model_gguf(tmp_path / "model.gguf", model, keys=keys, tensors=tensors)
    with pytest.raises(BaseModelError) as error:
        config_from_gguf(read_header(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_the_factors_of_the_test_follow_from_the_settings():
    """The test's own formula, on numbers computed by hand: the wavelengths are 2 pi and 20 pi."""
    rope = {"rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = llama3_factors(rope | {"original_max_position_embeddings": 100}, 4)
    smooth = (100 / (20 * torch.pi) - 1) / 3
    assert factors.tolist() == pytest.approx([1.0, 1 / ((1 - smooth) / 4 + smooth)])
