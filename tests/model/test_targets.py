"""Which layers `targets` means, on real architectures."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.load import Base, load_base
from qlora_lite.model.shape import model_shape
from qlora_lite.model.targets import LinearSpec, linear_specs, select, specs_of_shape
from tests.tiny import FAMILIES, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama() -> list[LinearSpec]:
    return linear_specs(tiny_model("llama"))


def names(specs: list[LinearSpec]) -> list[str]:
    return [spec.name for spec in specs if spec.block in (0, None)]


def test_a_llama_layer_by_layer(llama):
    assert len(llama) == 2 * 7 + 1
    assert llama[1] == LinearSpec("model.layers.0.self_attn.k_proj", 64, 32, 0, 2, "attention")
    assert llama[13] == LinearSpec("model.layers.1.mlp.down_proj", 128, 64, 1, 2, "mlp")
    assert llama[14] == LinearSpec("lm_head", 64, 400, None, 2, "head")


def test_words_mean_their_part(llama):
    assert names(select(llama, "all-linear")) == ATTENTION + MLP
    assert names(select(llama, "attention")) == ATTENTION
    assert names(select(llama, "mlp")) == MLP


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["q_proj"]),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        (["attention", "up_proj"], [*ATTENTION, "up_proj"]),
        (["*.layers.0.*_proj"], ATTENTION + MLP),
        (["model.layers.0.mlp.up_proj"], ["up_proj"]),
        (["all-linear", "lm_head"], [*ATTENTION, *MLP, "lm_head"]),
    ],
)
def test_lists_may_mix_words_names_paths_and_globs(llama, targets, expected):
    assert names(select(llama, targets)) == expected


def test_a_target_that_matches_nothing_names_what_there_is(llama):
    with pytest.raises(AdapterError, match=r"'q_prj' matches no.*down_proj.*mean 'q_proj'"):
        select(llama, ["v_proj", "q_prj"])


def test_frozen_layers_have_the_same_specs_as_plain_ones(tiny_gpt2):
    loaded = load_base(Base(model=str(tiny_gpt2)), choose("cpu"))
    plain = linear_specs(AutoModelForCausalLM.from_pretrained(tiny_gpt2))
    assert linear_specs(loaded.model) == plain
    assert plain[0] == LinearSpec("transformer.h.0.attn.c_attn", 64, 192, 0, 2, "attention")


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("gpt2", 2, 2),
        ("gpt_neox", 2, 2),
        ("opt", 4, 2),
        ("bloom", 2, 2),
        ("phi3", 2, 2),
        ("qwen3", 4, 3),
        ("gemma2", 4, 3),
        ("olmo2", 4, 3),
        ("starcoder2", 4, 2),
    ],
)
def test_kinds_are_right_in_other_architectures(family, attention, mlp):
    config = CONFIG_MAPPING[family]()
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = Counter(spec.kind for spec in linear_specs(model) if spec.block == 0)
    assert found == {"attention": attention, "mlp": mlp}


@pytest.mark.parametrize("family", FAMILIES)
def test_dimensions_alone_give_the_same_layers_as_the_model(family):
    model = tiny_model(family)
    assert specs_of_shape(model_shape(model.config)) == linear_specs(model)


@pytest.mark.parametrize(
    ("family", "settings", "kinds"),
    [
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128}, {"attention": 8, "mlp": 4, "head": 1}),
        # its linear layers are of a class of their own and stay as they are
        ("falcon", {}, {"head": 1}),
    ],
)
def test_dimensions_alone_agree_on_other_paths_and_classes(family, settings, kinds):
    size = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING[family](**size, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    specs = linear_specs(model)
    assert specs_of_shape(model_shape(config)) == specs
    assert Counter(spec.kind for spec in specs) == kinds
