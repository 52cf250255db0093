"""Decoder and head, called separately, give the logits of the model's own forward."""

import pytest
import torch
from torch.testing import assert_close

from qlora_lite.model.head import Head, soft_cap
from qlora_lite.model.towers import text_tower
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_the_models_own_forward(family):
    settings = {"final_logit_softcapping": 0.5} if family.startswith("gemma") else {}
    model = tiny_model(family, **settings)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        hidden = text_tower(model)(input_ids=ids, use_cache=False).last_hidden_state
        assert_close(Head(model).logits(hidden), model(ids, use_cache=False).logits)


def test_these_families_really_scale_and_cap():
    found = {
        family: (head.multiplier, head.divisor, head.cap)
        for family in ("cohere", "granite", "gemma2", "llama")
        for head in [Head(tiny_model(family))]
    }
    assert found == {
        "cohere": (0.25, None, None),
        "granite": (None, 2.0, None),
        "gemma2": (None, None, 30.0),
        "llama": (None, None, None),
    }


def test_a_soft_cap_keeps_small_values_and_bounds_large_ones():
    assert_close(soft_cap(torch.tensor([0.01, 1e6, -1e6]), 30.0), torch.tensor([0.01, 30.0, -30.0]))


def test_the_head_is_looked_up_every_time_because_an_adapter_may_replace_it():
    model = tiny_model("llama")
    head = Head(model)
    model.lm_head = torch.nn.Linear(64, 7)
    assert head.logits(torch.zeros(1, 64)).shape == (1, 7)
    assert [p.shape[0] for p in head.parameters()] == [7, 7]
