"""Adapters of other ranks from one run."""

import json

import peft
import pytest
import torch

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.foundation.errors import AdapterError, ExportError, RunError
from qlora_lite.methods.dylora import DyLoRA
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.mora import MoRA
from qlora_lite.methods.pissa import PiSSA
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from qlora_lite.run.extracting import extract
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import run_recipe
from tests.damage import flip_bit
from tests.dense_twin import dense_twin
from tests.end_to_end.small_run import recipe_in
from tests.workbench import CPU

IDS = torch.arange(5, 45).view(2, 20)


def run_of(folder, settings):
    recipe = recipe_in(folder, settings.kind)
    recipe = recipe.model_copy(update={"adapter": settings}).but("optim.steps=4")
    return run_recipe(recipe).directory


def logits_in_peft(folder, adapter):
    twin = dense_twin(load_base(Base(model=str(folder / "base")), CPU).model)
    model = peft.PeftModel.from_pretrained(twin, adapter).eval()
    with torch.no_grad():
        return model(IDS).logits


def test_one_dylora_run_gives_an_adapter_of_every_rank(folder):
    run = run_of(folder, DyLoRA(rank=4, alpha=6))
    outputs = []
    for rank in (1, 2, 3, 4):
        out = folder / f"dylora-{rank}"
        assert extract(run, out, rank) == 0
        loaded = load_run(run)
        for layer in loaded.attached.layers.values():
            layer.eval_rank = rank
        with torch.no_grad():
            expected = loaded.model(input_ids=IDS).logits
        outputs.append(expected)
        torch.testing.assert_close(logits_in_peft(folder, out), expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(outputs[0], outputs[3], atol=1e-3)
    with pytest.raises(AdapterError, match="rank 5 here: the largest trained rank is 4"):
        extract(run, folder / "dylora-5", 5)
    (folder / "link").symlink_to(folder / "nothing")
    for taken in ("dylora-1", "link"):
        with pytest.raises(RunError, match="exists already"):
            extract(run, folder / taken, 2)


def test_the_same_call_finds_its_finished_adapter(folder):
    run, out = folder / "dylora", folder / "dylora-1"
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert extract(run, out, 1) == 0
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    flip_bit(out / "adapter_model.safetensors", -1)
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors changed"):
        extract(run, out, 1)


def test_mora_is_approximated_and_the_error_is_returned_and_recorded(folder):
    run = run_of(folder, MoRA(rank=4, type=6))
    errors = [extract(run, folder / f"mora-{rank}", rank) for rank in (4, 16)]
    assert 0 < errors[1] < errors[0] < 1
    run = load_run(run).attached
    assert isinstance(run, AttachedAdapter)
    layer_errors = [layer.factors(4).relative_error for layer in run.layers.values()]
    assert errors[0] == pytest.approx(max(layer_errors))
    assert max(layer_errors) > min(layer_errors)
    sidecar = json.loads((folder / "mora-4" / "qlora_lite.json").read_text())
    assert sidecar["relative_error"] == errors[0]
    assert logits_in_peft(folder, folder / "mora-4").isfinite().all()


def test_a_method_that_trained_one_rank_cannot_be_cut(folder):
    with pytest.raises(AdapterError, match="no adapter of rank 2"):
        extract(run_of(folder, LoRA(rank=4)), folder / "lora-2", 2)


@pytest.mark.parametrize("settings", [LoftQ(rank=4), PiSSA(rank=4, mode="requantise")])
def test_an_adapter_of_a_changed_base_cannot_be_extracted(folder, settings):
    run = run_of(folder, settings)
    with pytest.raises(AdapterError, match="does not work on the plain base"):
        extract(run, folder / f"{settings.kind}-4", 4)
    assert not (folder / f"{settings.kind}-4").exists()
