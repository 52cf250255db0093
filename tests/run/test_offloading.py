"""Settings that `offload` refuses, each with the nearest one that works."""

from dataclasses import replace

import pytest
import torch

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.run.offloading import require_compatible
from qlora_lite.run.setup import set_up
from tests.end_to_end.small_run import small_recipe


@pytest.mark.parametrize(
    ("stage", "changes", "compute", "help_text"),
    [
        ("zero2", ["adapter.dtype=auto"], torch.float16, "base.compute=fp32"),
        ("zero2", ["adapter.dtype=bf16"], torch.float32, "adapter.dtype=auto"),
        ("zero2", ["optim.states=8bit"], torch.float32, "optim.states=auto"),
        ("zero2", ["optim.rounding=stochastic"], torch.float32, "optim.rounding=master"),
        ("zero3", ['adapter.targets=["lm_head"]'], torch.float32, "offload=zero2"),
        (
            "zero3",
            ["adapter=ba_lora", 'adapter.train_modules=["lm_head"]'],
            torch.float32,
            "offload=zero2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path, tiny_llama, stage, changes, compute, help_text
):
    recipe = small_recipe(tiny_llama, tmp_path / "rows.jsonl", tmp_path / "run")
    rule = replace(choose("cpu", "fp32"), compute=compute)
    with pytest.raises(RecipeError, match=help_text):
        require_compatible(set_up(recipe.but(f"offload={stage}", *changes), rule))
    require_compatible(set_up(recipe.but(f"offload={stage}"), choose("cpu", "fp32")))
    if stage == "zero3":
        require_compatible(set_up(recipe.but("offload=zero2", *changes), rule))
