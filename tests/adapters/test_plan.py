"""What will be trained in a base, decided before a weight is read."""

import pytest

from qlora_lite.adapters.plan import match_modules, plan_adapter
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.facts import facts_of
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def facts():
    return facts_of(tiny_model("llama").config)


def plan_of(facts, **settings):
    return plan_adapter(method_for(LoRA(**settings)), facts)


def test_targets_ranks_and_scales(facts):
    plan = plan_of(facts, rank=8, alpha=16, targets=["q_proj", "up_proj"], ranks={"1": 4})
    assert plan.layers == {
        "model.layers.0.self_attn.q_proj": LayerPlan(8, 2.0),
        "model.layers.0.mlp.up_proj": LayerPlan(8, 2.0),
        "model.layers.1.self_attn.q_proj": LayerPlan(4, 4.0),
        "model.layers.1.mlp.up_proj": LayerPlan(4, 4.0),
    }
    assert [spec.path for spec in plan.specs] == list(plan.layers)
    assert (plan.embedding, plan.full_modules) == (None, ())


def test_layers_of_rank_0_are_not_in_the_plan(facts):
    plan = plan_of(facts, targets=["q_proj"], ranks={"1": 0})
    assert [spec.path for spec in plan.specs] == ["model.layers.0.self_attn.q_proj"]


def test_an_embedding_and_full_modules(facts):
    plan = plan_of(facts, embedding_rank=2, train_modules=["lm_head", "norm"], train_norms=True)
    assert plan.embedding == "model.embed_tokens"
    assert plan.full_modules == (
        "lm_head",
        "model.norm",
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    )


def test_a_fully_trained_head_is_not_adapted_as_well(facts):
    plan = plan_of(facts, targets=["q_proj", "lm_head"], train_modules=["lm_head"])
    assert plan.full_modules == ("lm_head",)
    assert {spec.name for spec in plan.specs} == {"q_proj"}


def test_modules_are_matched_by_path_last_name_or_glob(facts):
    by_glob = match_modules(facts.shape, ["*.0.mlp.*"])
    names = ("gate_proj", "up_proj", "down_proj")
    assert by_glob == [f"model.layers.0.mlp.{name}" for name in names]
    assert match_modules(facts.shape, ["up_proj", *by_glob]) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_a_method_that_changes_the_base_cannot_adapt_the_head(facts):
    with pytest.raises(AdapterError, match=r"the head \(lm_head\) is not quantised"):
        plan_adapter(method_for(LoftQ(targets=["q_proj", "lm_head"])), facts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": "q_prj"}, ["'q_prj' matches no linear layer"]),
        ({"targets": "[q_proj,v_proj]"}, ["""A list of names is written '["q_proj", "v_proj"]'"""]),
        ({"targets": []}, ["adapter.targets is empty"]),
        ({"ranks": {"7-9": 4}}, ["'7-9' matches no adapted layer", "0-1"]),
        ({"ranks": {"*": 0}}, ["every target rank 0"]),
        (
            {"embedding_rank": 2, "train_modules": ["embed_tokens"]},
            ["both train model.embed_tokens"],
        ),
        ({"train_modules": ["head"]}, ["'head' matches no module", "lm_head"]),
    ],
)
def test_a_setting_that_matches_nothing_is_an_error_with_the_available_names(
    facts, settings, words
):
    with pytest.raises(AdapterError) as caught:
        plan_of(facts, **settings)
    for word in words:
        assert word in str(caught.value)
