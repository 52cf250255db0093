"""What follows from a recipe before a weight is read."""

import pytest
import torch

from qlora_lite.foundation import device
from qlora_lite.foundation.errors import AdapterError, RecipeError
from qlora_lite.run.planning import plan_recipe
from qlora_lite.run.setup import set_up
from tests.end_to_end.small_run import recipe_in

CPU = device.choose("cpu")


def test_loftq_needs_a_quantised_base(folder):
    for quant in ("bf16", "fp32"):
        recipe = recipe_in(folder, "loftq", "adapter=loftq", f"base.quant={quant}")
        with pytest.raises(RecipeError, match=r"quantisation error.*base\.quant=nf4"):
            plan_recipe(recipe)
    assert plan_recipe(recipe_in(folder, "loftq", "adapter=loftq", "base.quant=int8"))


def test_adapters_are_stored_in_the_dtype_of_the_recipe_or_of_the_device(folder):
    def dtype_of(*changes):
        return set_up(recipe_in(folder, "run", *changes), CPU).adapter_dtype

    assert dtype_of() is torch.bfloat16
    assert dtype_of("adapter.dtype=fp32") is torch.float32


def test_targets_that_match_nothing_are_an_error(folder):
    with pytest.raises(AdapterError, match="'c_attn' matches no linear layer"):
        set_up(recipe_in(folder, "run", "adapter.targets=c_attn"), CPU)


def test_a_known_model_needs_no_config_for_a_plan(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = recipe_in(folder, "run", "base.model=Qwen/Qwen3-0.6B")
    assert set_up(recipe, CPU, needs_config=False).facts.shape.num_parameters == 596_049_920
