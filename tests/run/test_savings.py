"""Settings that need less memory: each has in a recipe the effect that the plan assumes."""

import pytest

from qlora_lite.foundation import device
from qlora_lite.run.planning import run_shape
from qlora_lite.run.savings import alternatives
from qlora_lite.run.setup import set_up
from tests.end_to_end.small_run import recipe_in

CPU = device.choose("cpu")
WASTEFUL = (
    "base.quant=int8",
    "optim.checkpointing=false",
    "optim.micro_batch_tokens=2048",
    "data.max_tokens=512",
    "adapter.rank=8",
)


@pytest.mark.parametrize("changes", [WASTEFUL, ("base.quant.double_quant=false",)])
def test_a_suggested_setting_changes_the_recipe_as_the_plan_assumes(folder, changes):
    recipe = recipe_in(folder, "run", *changes)
    run = run_shape(set_up(recipe, CPU))
    for alternative in alternatives(run):
        changed = run_shape(set_up(recipe.but(alternative.setting), CPU))
        assert changed == alternative.apply(run), alternative.setting
        assert changed != run


def test_the_order_is_from_no_effect_on_the_result_to_the_largest(folder):
    run = run_shape(set_up(recipe_in(folder, "run", *WASTEFUL), CPU))
    assert [alternative.setting for alternative in alternatives(run)] == [
        "optim.micro_batch_tokens=512",
        "optim.checkpointing=true",
        "base.quant=nf4",
        "adapter.rank=4",
        "base.head=nf4",
        "data.max_tokens=256",
    ]
