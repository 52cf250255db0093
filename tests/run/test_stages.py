"""The stages of a recipe, the one that is recommended, and its settings on the command line."""

import pytest

from qlora_lite.foundation import device
from qlora_lite.foundation.units import format_bytes
from qlora_lite.run import planning
from qlora_lite.run.setup import set_up
from qlora_lite.run.stages import STAGES, plan_stages, recommended
from tests.end_to_end.small_run import recipe_in

CPU = device.choose("cpu")
CARD = device.choose("cuda", allow_absent=True)


def stages_of(folder, *changes, processes=2, rule=CPU):
    changes = ("base.quant=bf16", "base.compute=auto", *changes)
    return plan_stages(set_up(recipe_in(folder, "run", *changes), rule), processes)


def test_the_settings_of_every_stage_give_its_offload(folder):
    recipe = recipe_in(folder, "run")
    for setting, offload in STAGES.items():
        assert recipe.but(*setting.split()).offload == offload


def test_the_first_stage_that_fits_is_recommended(folder):
    card_bytes = [s.card_bytes for s in stages_of(folder, "budget=1TiB", rule=CARD)]
    smallest = min(card_bytes)
    assert card_bytes.index(smallest) == len(STAGES) - 1
    for limit in sorted(card_bytes):
        chosen = recommended(stages_of(folder, f"budget={limit}", rule=CARD))
        first = next(i for i, num in enumerate(card_bytes) if num <= limit)
        assert chosen.setting == list(STAGES)[first]
    assert recommended(stages_of(folder, f"budget={smallest - 1}", rule=CARD)) is None


def test_host_memory_of_a_card_is_that_of_all_processes(folder):
    one, four = (stages_of(folder, "budget=1TiB", rule=CARD, processes=num)[4] for num in (1, 4))
    # every process has Python, and a quarter of the base instead of all of it
    process = stages_of(folder, "budget=1TiB", rule=CARD, processes=1)[0].host_bytes
    assert four.host_bytes - one.host_bytes == pytest.approx(3 * process, rel=0.01)


def test_on_cpu_there_is_no_card_and_the_free_memory_is_shared(folder, monkeypatch):
    needed = stages_of(folder, "budget=1TiB")[0].host_bytes
    for free, fits in ((needed, True), (needed - 2, False)):
        monkeypatch.setattr(planning, "available_bytes", lambda device, free=free: free)
        stage = stages_of(folder)[0]
        assert (stage.fits, stage.card_bytes) == (fits, 0)


def test_a_stage_that_the_recipe_cannot_use_says_why(folder):
    none, *others = stages_of(folder, "adapter.dtype=bf16", "budget=1TiB")
    assert none.fits
    assert not any(stage.fits for stage in others)
    assert all("adapter.dtype=bf16" in stage.problem for stage in others)
    assert format_bytes(others[0].host_bytes) == "0 B"
