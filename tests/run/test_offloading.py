"""Settings that `offload` refuses, each with the nearest one that works."""

import pytest
import torch

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.run.offloading import require_compatible
from tests.end_to_end.small_run import small_recipe


@pytest.mark.parametrize(
    ("setting", "compute", "help_text"),
    [
        ("adapter.dtype=auto", torch.float16, "base.compute=fp32"),
        ("adapter.dtype=bf16", torch.float32, "adapter.dtype=auto"),
        ("optim.states=8bit", torch.float32, "optim.states=auto"),
        ("optim.rounding=stochastic", torch.float32, "optim.rounding=master"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, setting, compute, help_text):
    recipe = small_recipe(tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run")
    with pytest.raises(RecipeError, match=help_text):
        require_compatible(recipe.but("offload=zero2", setting), compute)
    require_compatible(recipe.but("offload=zero2"), torch.float32)
