"""Sorting the tensors of an adapter by module: each belongs to one module, and none is missing."""

import pytest
import torch

from qlora_lite.export.adapter_parts import sort_by_module
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.facts import facts_of
from tests.tiny import tiny_model

UP = "model.layers.1.mlp.up_proj"
SETTINGS = LoRA(rank=4, targets=["up_proj"], embedding_rank=2, train_norms=True)


@pytest.fixture(scope="module")
def facts():
    return facts_of(tiny_model("llama").config)


def state_of(facts):
    state = {p.name: torch.ones(p.shape) for p in facts.shape.parameters if p.role == "norm"}
    for path in ("model.layers.0.mlp.up_proj", UP):
        state |= {f"{path}.a": torch.ones(4, 64), f"{path}.b": torch.ones(128, 4)}
    embedding = "model.embed_tokens"
    return state | {f"{embedding}.a": torch.ones(2, 400), f"{embedding}.b": torch.ones(64, 2)}


def sort(state, facts, settings=SETTINGS):
    return sort_by_module(state, method_for(settings), facts)


def test_every_tensor_is_in_one_part(facts):
    parts = sort(state_of(facts), facts)
    assert set(parts.layers) == set(parts.plan.layers) == {"model.layers.0.mlp.up_proj", UP}
    assert all(set(tensors) == {"a", "b"} for tensors in parts.layers.values())
    assert {path: set(tensors) for path, tensors in parts.embeddings.items()} == {
        "model.embed_tokens": {"a", "b"}
    }
    assert len(parts.full_parameters) == 5
    assert len(parts.changed_modules) == 2 + 1 + 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.b", None),
        ("model.layers.7.mlp.up_proj.a", torch.ones(4, 64)),
        ("model.layers.0.self_attn.q_proj.a", torch.ones(4, 64)),
        ("unknown", torch.ones(4)),
    ],
    ids=["missing", "unknown layer", "not a target", "unknown"],
)
def test_a_missing_or_extra_tensor_is_named(facts, name, value):
    state = state_of(facts)
    if value is None:
        del state[name]
    else:
        state[name] = value
    expected = name.replace("tokens.b", "tokens.a")
    with pytest.raises(AdapterError, match=rf"disagree about {expected}:"):
        sort(state, facts)


def test_a_layer_without_any_tensor_is_named(facts):
    state = {name: t for name, t in state_of(facts).items() if not name.startswith(UP)}
    with pytest.raises(AdapterError, match=rf"{UP}\.\*"):
        sort(state, facts)


def test_a_full_module_that_is_not_in_the_settings_is_refused(facts):
    settings = LoRA(rank=4, targets=["up_proj"], embedding_rank=2)
    with pytest.raises(AdapterError, match=r"layernorm\.weight"):
        sort(state_of(facts), facts, settings)


def test_a_full_module_of_another_size_is_refused(facts):
    state = state_of(facts) | {"model.norm.weight": torch.ones(32)}
    with pytest.raises(AdapterError, match=r"norm\.weight has shape \(32,\).*another base model"):
        sort(state, facts)


def test_matrices_of_full_modules_are_compared_as_outputs_by_inputs():
    facts = facts_of(tiny_model("gpt2", tied=True).config)
    settings = LoRA(rank=4, targets=["c_attn"], train_modules=["transformer.h.0.mlp.c_fc"])
    state = {"transformer.h.0.mlp.c_fc.weight": torch.ones(256, 64)}
    state["transformer.h.0.mlp.c_fc.bias"] = torch.ones(256)
    for block in (0, 1):
        path = f"transformer.h.{block}.attn.c_attn"
        state |= {f"{path}.a": torch.ones(4, 64), f"{path}.b": torch.ones(192, 4)}
    assert set(sort(state, facts, settings).full_parameters) == {
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_fc.bias",
    }


@pytest.mark.parametrize("lost", ["norm", "lm_head"])
def test_fully_trained_modules_may_not_be_missing_altogether(facts, lost):
    """Nothing in the state names them, so only the settings say that they were trained."""
    settings = SETTINGS.model_copy(update={"train_modules": ["lm_head"]})
    state = state_of(facts) | {"lm_head.weight": torch.ones(400, 64)}
    assert len(sort(state, facts, settings).full_parameters) == 6
    remaining = {name: t for name, t in state.items() if lost not in name}
    with pytest.raises(AdapterError, match="disagree about"):
        sort(remaining, facts, settings)
