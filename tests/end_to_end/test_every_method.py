"""Every method from recipe to merged model: killed, continued, loaded, merged, started from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.foundation.errors import AdapterError, ExportError
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.scoring import score_targets
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import Killed, Killer, recipe_in
from tests.properties.cases import CASES

QUICK = ("pissa, requantised", "adalora", "cola")


def recipe_of(folder, case, output, *changes):
    recipe = recipe_in(folder, output)
    settings = case.model_settings.model_copy(update={"dropout": 0.1})
    recipe = recipe.model_copy(update={"adapter": settings})
    return recipe.but("optim.steps=8", "checkpoints.every=2", *changes)


def cases():
    """Methods with different kinds of state run by default, all others are slow tests."""
    for name in CASES:
        marks = () if name in QUICK else (pytest.mark.slow,)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(cases()))
def test_a_killed_run_continues_and_merges(folder, name):
    case, key = CASES[name], name.replace(", ", "-")
    uninterrupted = run_recipe(recipe_of(folder, case, f"{key}-uninterrupted"))
    with pytest.raises(Killed):
        run_recipe(recipe_of(folder, case, f"{key}-killed"), watcher=Killer())
    killed = run_recipe(recipe_of(folder, case, f"{key}-killed"))
    expected = load_file(uninterrupted.directory / "adapter" / "native.safetensors")
    found = load_file(killed.directory / "adapter" / "native.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())
    assert losses_of(killed) == losses_of(uninterrupted)

    loaded = load_run(uninterrupted.directory)
    sidecar = json.loads((uninterrupted.directory / "adapter" / "qlora_lite.json").read_text())
    assert sidecar["peft"] == case.peft
    result = merge(uninterrupted.directory, folder / f"{key}-merged", base="trained", dtype="fp32")
    assert result.written.is_exact
    rows = score_targets([str(uninterrupted.directory)])
    kinds = ["bare base", "adapter"] if loaded.attached.is_base_unchanged else ["adapter"]
    assert [row.what for row in rows] == kinds

    started_from_it = recipe_of(
        folder,
        case,
        f"{key}-started",
        f"adapter.start={uninterrupted.directory / 'adapter'}",
    )
    started = run_recipe(started_from_it)
    assert started.scores["loss_before"] == pytest.approx(uninterrupted.scores["loss"], rel=1e-4)


def losses_of(result):
    events = metrics.read(result.directory / "metrics.jsonl")
    return [event["loss"] for event in events if "loss" in event]


def test_an_adapter_of_a_changed_base_is_not_merged_into_the_original(folder):
    run = run_recipe(recipe_of(folder, CASES["loftq"], "own-base"))
    assert (
        "only works on that changed base" in (run.directory / "adapter" / "README.md").read_text()
    )
    with pytest.raises(AdapterError, match="Merge its run"):
        run_recipe(
            recipe_of(folder, CASES["lora"], "other", f"adapter.start={run.directory / 'adapter'}")
        )
    with pytest.raises(ExportError, match="changed the base weights"):
        merge(run.directory, folder / "own-base-merged", base="original")
    result = merge(run.directory, folder / "own-base-merged", base="auto")
    assert result.base == "trained"


@pytest.mark.parametrize("name", ["loftq", "pissa, requantised"])
def test_a_method_that_changes_the_base_cannot_start_from_a_lora_or_adapt_the_head(folder, name):
    lora = run_recipe(recipe_of(folder, CASES["lora"], f"plain-{name[:5]}"))
    start = f"adapter.start={lora.directory / 'adapter'}"
    with pytest.raises(AdapterError, match="cannot start from"):
        run_recipe(recipe_of(folder, CASES[name], f"from-lora-{name[:5]}", start))
    head = 'adapter.targets=["q_proj", "lm_head"]'
    with pytest.raises(AdapterError, match=r"the head \(lm_head\)"):
        run_recipe(recipe_of(folder, CASES[name], f"head-{name[:5]}", head))
