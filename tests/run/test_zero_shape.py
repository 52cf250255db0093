"""What the plan reads from a DeepSpeed configuration."""

import json

import pytest

from qlora_lite.foundation import device
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.memory.zero_terms import ZeroShape
from qlora_lite.offload.zero import LIVE_NUMBERS, MAX_BUCKET_NUMBERS
from qlora_lite.run.offloading import zero_shape
from qlora_lite.run.planning import check_settings
from qlora_lite.run.setup import set_up
from tests.end_to_end.small_run import recipe_in

CPU = device.choose("cpu")
CARD = device.choose("cuda", allow_absent=True)


def shape_of(folder, *changes, rule=CPU, num_trained=1000):
    recipe = recipe_in(folder, "run", "base.compute=auto", *changes)
    return zero_shape(set_up(recipe, rule), num_trained)


def test_without_offload_there_is_nothing_to_read(folder):
    assert shape_of(folder) is None


def test_a_bucket_has_as_many_numbers_as_are_trained_up_to_a_limit(folder):
    assert shape_of(folder, "offload=zero2").bucket_numbers == 1000
    assert shape_of(folder, "offload=zero2", num_trained=10**9).bucket_numbers == MAX_BUCKET_NUMBERS
    # DeepSpeed needs an even number
    assert shape_of(folder, "offload=zero2", "offload.bucket_size=77").bucket_numbers == 78


def test_on_a_card_buckets_are_double_and_gathered_weights_are_kept(folder):
    assert shape_of(folder, "offload=zero1", rule=CARD).num_buckets == 2
    card, cpu = (shape_of(folder, "offload=zero3", rule=rule) for rule in (CARD, CPU))
    assert (card.num_buckets, card.live_numbers) == (1, LIVE_NUMBERS)
    assert (cpu.num_buckets, cpu.live_numbers) == (1, 0)


def test_a_deepspeed_file_wins_and_auto_leaves_a_value_to_the_recipe(folder, tmp_path):
    file = tmp_path / "ds.json"
    section = {
        "stage": 3,
        "reduce_bucket_size": 2e8,
        "stage3_max_live_parameters": "auto",
        "offload_param": {"device": "nvme", "buffer_count": 3, "buffer_size": 1e6},
        "offload_optimizer": {"device": "cpu"},
    }
    file.write_text(json.dumps({"zero_optimization": section}))
    assert shape_of(folder, "offload=zero3", f"offload.config={file}", rule=CARD) == ZeroShape(
        stage=3,
        optimizer="cpu",
        parameters="nvme",
        bucket_numbers=200_000_000,
        live_numbers=LIVE_NUMBERS,
        swap_bytes=4 * 3 * 1_000_000,
    )


def test_what_zero_does_not_support_is_refused_by_a_plan(folder):
    recipe = recipe_in(folder, "run", "offload=zero3", "adapter.dtype=bf16")
    with pytest.raises(RecipeError, match=r"adapter\.dtype=bf16, and offload=zero3"):
        check_settings(set_up(recipe, CPU))
