"""What the config of a base determines."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.facts import facts_of, read_facts
from qlora_lite.model.settings import Base
from tests.families import tiny_config
from tests.tiny import tiny_model


def test_the_facts_of_a_tied_gpt2(tiny_gpt2):
    facts = read_facts(Base(model=str(tiny_gpt2)))
    assert (facts.vocabulary, facts.context, facts.prefix) == (400, 512, "transformer")
    assert facts.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert [spec.path for spec in facts.specs if spec.block != 1] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
        "lm_head",
    ]


def test_an_untied_llama_has_a_buffer_and_no_ties():
    facts = facts_of(tiny_model("llama").config)
    assert facts.tied == {}
    assert "model.rotary_emb.inv_freq" in facts.buffers
    assert facts.prefix == "model"


def test_stored_names_are_mapped_to_those_of_the_model(tiny_gpt2):
    facts = read_facts(Base(model=str(tiny_gpt2)))
    names = [p.name for p in facts.shape.parameters if p.tied_to is None]
    without_prefix = [name.removeprefix("transformer.") for name in names]
    assert facts.match_names(without_prefix) == dict(zip(without_prefix, names, strict=True))


def test_companions_of_quantised_weights_are_not_parameters():
    facts = facts_of(tiny_model("llama").config)
    names = [p.name for p in facts.shape.parameters]
    companions = ["lm_head.weight.absmax", "lm_head.weight.quant_map", "lm_head.SCB"]
    assert facts.match_names([*names, *companions]) == {name: name for name in names}
    with pytest.raises(BaseModelError, match=r"lm_head\.unknown"):
        facts.match_names([*names, "lm_head.unknown"])


def test_building_the_facts_does_not_change_the_config():
    config = tiny_model("llama").config
    before = config.to_dict()
    facts_of(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("family", "architecture", "words"),
    [
        ("bert", "BertForMaskedLM", r"is an encoder \(BertForMaskedLM\)"),
        ("whisper", "WhisperForConditionalGeneration", "is an encoder-decoder model"),
    ],
)
def test_a_config_that_is_no_causal_language_model_is_refused(family, architecture, words):
    config = CONFIG_MAPPING[family](architectures=[architecture])
    with pytest.raises(BaseModelError, match=words):
        facts_of(config)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "big_bird", "xlm", "xlnet"])
def test_an_encoder_is_refused_whatever_its_config_says_about_classes(family):
    for classes in ({}, {"architectures": [f"{family}LMHeadModel"]}):
        with pytest.raises(BaseModelError, match="is an encoder"):
            facts_of(CONFIG_MAPPING[family](**classes))


def test_an_encoder_family_is_accepted_as_a_decoder():
    assert facts_of(CONFIG_MAPPING["roberta"](is_decoder=True)).vocabulary > 0


def test_layers_that_share_their_weights_are_refused():
    with pytest.raises(BaseModelError, match=r"zamba2 is not supported yet: .* shares its weight"):
        facts_of(tiny_config("zamba2"))


def test_an_architecture_with_a_backward_of_its_own_is_refused():
    with pytest.raises(BaseModelError, match="reformer is not supported: its backward"):
        facts_of(tiny_config("reformer"))
