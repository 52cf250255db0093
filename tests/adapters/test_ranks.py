"""The rank and the scale of every layer, before anything is built."""

import pytest

from qlora_lite.adapters.ranks import LayerPlan, rank_of, scale_of
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.overrides import validate
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.model.targets import LinearSpec

SPECS = [
    LinearSpec(f"model.layers.{block}.{name}", 8, 8, block, 12, "attention")
    for block in range(12)
    for name in ("self_attn.q_proj", "mlp.up_proj")
]


def test_the_last_matching_pattern_gives_the_rank():
    ranks = {"0-5": 32, "11": 0, "*.mlp.*": 4, "model.layers.3.self_attn.q_proj": 7}
    found = {spec.path: rank_of(spec, 16, ranks) for spec in SPECS}
    assert found["model.layers.0.self_attn.q_proj"] == 32
    assert found["model.layers.5.self_attn.q_proj"] == 32
    assert found["model.layers.6.self_attn.q_proj"] == 16
    assert found["model.layers.11.self_attn.q_proj"] == 0
    assert found["model.layers.11.mlp.up_proj"] == 4
    assert found["model.layers.3.self_attn.q_proj"] == 7


def test_a_name_is_a_pattern_too():
    assert rank_of(SPECS[1], 16, {"up_proj": 2}) == 2
    assert rank_of(SPECS[0], 16, {"up_proj": 2}) == 16


def test_layers_of_rank_0_are_not_planned_and_scales_follow_the_rank():
    plans = LoRAMethod(LoRA(rank=8, alpha=16, ranks={"0": 4, "1-11": 0})).plan(SPECS)
    assert set(plans) == {SPECS[0].path, SPECS[1].path}
    assert plans[SPECS[0].path] == LayerPlan(rank=4, scale=4.0)


@pytest.mark.parametrize("rank", [1, 4, 64, 256])
def test_rslora_is_lora_with_alpha_times_the_root_of_the_rank(rank):
    ours = LoRAMethod(RsLoRA(rank=rank, alpha=16)).plan(SPECS[:1])[SPECS[0].path]
    same = LoRA(rank=rank, alpha=16 * rank**0.5)
    assert ours.scale == pytest.approx(scale_of(same.alpha, rank, same.scaling))


def test_a_negative_rank_is_refused_with_its_path():
    with pytest.raises(RecipeError, match=r"ranks: .*'0' is -1"):
        validate(LoRA, {"ranks": {"0": -1}})
