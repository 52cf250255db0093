"""Names of stored tensors mapped to names in the model."""

import pytest

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.names import match

GPT2 = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"]
TIED = {"lm_head.weight": "transformer.wte.weight"}


def test_equal_names_match():
    assert match(["a.weight", "b.bias"], ["a.weight", "b.bias"]) == {
        "a.weight": "a.weight",
        "b.bias": "b.bias",
    }


def test_a_missing_prefix_is_added_and_old_buffers_are_ignored():
    stored = ["wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.bias", "h.0.attn.masked_bias"]
    assert match(stored, GPT2, tied=TIED, prefix="transformer") == {
        "wte.weight": "transformer.wte.weight",
        "h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn.weight",
    }


def test_a_prefix_that_the_model_lacks_is_removed():
    assert match(["model.a.weight"], ["a.weight"], prefix="model") == {"model.a.weight": "a.weight"}


def test_a_tied_tensor_is_used_once_whichever_name_is_stored():
    rest = {"transformer.h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn.weight"}
    both = match(GPT2, GPT2, tied=TIED, prefix="transformer")
    assert both == {"transformer.wte.weight": "transformer.wte.weight"} | rest
    only_head = match(GPT2[1:], GPT2, tied=TIED, prefix="transformer")
    assert only_head == {"lm_head.weight": "transformer.wte.weight"} | rest


def test_a_missing_tensor_is_named():
    with pytest.raises(BaseModelError, match=r"has no b\.weight"):
        match(["a.weight"], ["a.weight", "b.weight"])


def test_an_unknown_tensor_is_named_unless_the_model_ignores_it():
    with pytest.raises(BaseModelError, match=r"holds vision\.weight"):
        match(["a.weight", "vision.weight"], ["a.weight"])
    match(["a.weight", "vision.weight"], ["a.weight"], ignored=[r"^vision\."])
