"""Which layers `targets` selects, on real architectures."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.shape import model_shape
from qlora_lite.model.targets import LinearSpec, linear_specs, select
from tests.tiny import FAMILIES, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama() -> list[LinearSpec]:
    return linear_specs(model_shape(tiny_model("llama").config))


def names(specs: list[LinearSpec]) -> list[str]:
    return [spec.name for spec in specs if spec.block in (0, None)]


def test_the_linear_layers_of_a_llama(llama):
    assert len(llama) == 2 * 7 + 1
    assert llama[1] == LinearSpec("model.layers.0.self_attn.k_proj", 64, 32, 0, 2, "attention")
    assert llama[13] == LinearSpec("model.layers.1.mlp.down_proj", 128, 64, 1, 2, "mlp")
    assert llama[14] == LinearSpec("lm_head", 64, 400, None, 2, "head")


def test_keywords_select_their_layers(llama):
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
def test_lists_may_mix_keywords_names_paths_and_globs(llama, targets, expected):
    assert names(select(llama, targets)) == expected


def test_a_target_that_matches_nothing_is_an_error_with_the_available_names(llama):
    with pytest.raises(AdapterError, match=r"'q_prj' matches no.*down_proj.*mean 'q_proj'"):
        select(llama, ["v_proj", "q_prj"])


@pytest.mark.parametrize("text", ["q_proj,v_proj", "[q_proj, v_proj]"])
def test_names_with_a_comma_between_them_are_answered_with_a_list(llama, text):
    with pytest.raises(AdapterError, match=r"""written '\["q_proj", "v_proj"\]'"""):
        select(llama, text)


def test_inputs_and_outputs_of_a_transposed_layer():
    specs = linear_specs(model_shape(tiny_model("gpt2").config))
    assert specs[0] == LinearSpec("transformer.h.0.attn.c_attn", 64, 192, 0, 2, "attention")


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
    found = Counter(spec.kind for spec in linear_specs(model_shape(config)) if spec.block == 0)
    assert found == {"attention": attention, "mlp": mlp}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_alone_gives_the_linear_layers_of_the_model(family):
    model = tiny_model(family)
    specs = {s.path: (s.d_out, s.d_in) for s in linear_specs(model_shape(model.config))}
    assert specs == sizes_of_linear_layers(model)


def sizes_of_linear_layers(model):
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[path] = (module.nf, module.nx)
    return found


@pytest.mark.parametrize(
    ("family", "settings", "kinds"),
    [
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128}, {"attention": 8, "mlp": 4, "head": 1}),
        # Falcon's linear layers are a subclass that computes the same
        ("falcon", {}, {"attention": 4, "mlp": 4, "head": 1}),
    ],
)
def test_the_config_alone_gives_the_linear_layers_of_unusual_models(family, settings, kinds):
    size = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING[family](**size, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    specs = linear_specs(model_shape(config))
    assert {s.path: (s.d_out, s.d_in) for s in specs} == sizes_of_linear_layers(model)
    assert Counter(spec.kind for spec in specs) == kinds
