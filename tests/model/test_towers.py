"""The text tower of a multimodal model, and the model of a text model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_lite.model.towers import is_multimodal, remove_other_towers, text_tower
from tests.families import tiny_config


def on_meta(family: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


def test_the_image_tower_of_gemma3_is_removed():
    model = on_meta("gemma3")
    assert is_multimodal(model)
    tower = model.model.language_model
    assert text_tower(model) is tower
    before = model.state_dict().keys()
    removed = remove_other_towers(model)
    assert before - removed == model.state_dict().keys()
    assert {name.split(".")[1] for name in removed} == {"vision_tower", "multi_modal_projector"}
    assert model.model.language_model is tower


@pytest.mark.parametrize("family", ["llama", "llama4_text", "mllama"])
def test_a_text_model_has_no_other_towers(family):
    """Those of Llama 4 and Llama 3.2 Vision name a base_model_prefix that is not there."""
    model = on_meta(family)
    assert not is_multimodal(model)
    assert text_tower(model) is model.model
    assert remove_other_towers(model) == frozenset()
