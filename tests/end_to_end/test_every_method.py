"""Every method from recipe to merged model: killed, continued, loaded, begun from, merged."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.foundation.errors import AdapterError, ExportError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.scoring import score_targets
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import recipe_in
from tests.properties.cases import CASES

QUICK = ("pissa, requantised", "adalora", "cola")


class Killed(Exception):
    """Nothing that the run would catch."""


class Killer(Watcher):
    """Ends the process's work right after the checkpoint of step 4."""

    def saved(self, step: int) -> None:
        if step == 4:
            raise Killed


def recipe_of(folder, case, output, *changes):
    recipe = recipe_in(folder, output)
    settings = case.model_settings.model_copy(update={"dropout": 0.1})
    recipe = recipe.model_copy(update={"adapter": settings})
    return recipe.but("optim.steps=8", "checkpoints.every=2", *changes)


def cases():
    """Those that keep different kinds of state are in the ordinary suite, all among the slow."""
    for name in CASES:
        marks = () if name in QUICK else (pytest.mark.slow,)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(cases()))
def test_a_run_survives_and_leaves_as_merged_weights(folder, name):
    case, key = CASES[name], name.replace(", ", "-")
    whole = run_recipe(recipe_of(folder, case, f"{key}-whole"))
    with pytest.raises(Killed):
        run_recipe(recipe_of(folder, case, f"{key}-killed"), watcher=Killer())
    killed = run_recipe(recipe_of(folder, case, f"{key}-killed"))
    expected = load_file(whole.directory / "adapter" / "native.safetensors")
    found = load_file(killed.directory / "adapter" / "native.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())
    assert losses_of(killed) == losses_of(whole)

    loaded = load_run(whole.directory)
    sidecar = json.loads((whole.directory / "adapter" / "qlora_lite.json").read_text())
    assert sidecar["peft"] == case.peft
    result = merge(whole.directory, folder / f"{key}-merged", base="trained", dtype="fp32")
    assert result.written.is_exact
    rows = score_targets([str(whole.directory)])
    kinds = ["bare base", "adapter"] if loaded.attached.is_base_unchanged else ["adapter"]
    assert [row.what for row in rows] == kinds

    begun = recipe_of(
        folder,
        case,
        f"{key}-begun",
        f"adapter.start={whole.directory / 'adapter'}",
    )
    begun = run_recipe(begun)
    assert begun.scores["loss_before"] == pytest.approx(whole.scores["loss"], rel=1e-4)


def losses_of(result):
    events = metrics.read(result.directory / "metrics.jsonl")
    return [event["loss"] for event in events if "loss" in event]


def test_an_adapter_on_a_base_of_its_own_is_not_merged_into_another(folder):
    run = run_recipe(recipe_of(folder, CASES["loftq"], "own-base"))
    assert "right on that base only" in (run.directory / "adapter" / "README.md").read_text()
    with pytest.raises(AdapterError, match="Merge its run"):
        run_recipe(
            recipe_of(folder, CASES["lora"], "other", f"adapter.start={run.directory / 'adapter'}")
        )
    with pytest.raises(ExportError, match="changed the weights at its start"):
        merge(run.directory, folder / "own-base-merged", base="original")
    result = merge(run.directory, folder / "own-base-merged", base="auto")
    assert result.base == "trained"


@pytest.mark.parametrize("name", ["loftq", "pissa, requantised"])
def test_a_start_inside_the_weights_is_neither_a_lora_nor_one_of_the_head(folder, name):
    lora = run_recipe(recipe_of(folder, CASES["lora"], f"plain-{name[:5]}"))
    start = f"adapter.start={lora.directory / 'adapter'}"
    with pytest.raises(AdapterError, match="cannot begin at"):
        run_recipe(recipe_of(folder, CASES[name], f"from-lora-{name[:5]}", start))
    head = 'adapter.targets=["q_proj", "lm_head"]'
    with pytest.raises(AdapterError, match=r"the head \(lm_head\)"):
        run_recipe(recipe_of(folder, CASES[name], f"head-{name[:5]}", head))
