"""In which dtype a run computes: chosen when it starts, recorded, and kept."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from qlora_lite.foundation.errors import DeviceError
from qlora_lite.foundation.processes import Processes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.kernels.speed import has_bf16_units
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.run import computing
from qlora_lite.run.computing import new_rule, rule_of_run
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in, result_of

ON_AN_OLDER_PROCESSOR = """
import sys
from qlora_lite import load_recipe
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.run.computing import new_rule
from qlora_lite.run.loading import load_run

class Printer(Watcher):
    def note(self, text):
        print(text)

print(new_rule(load_recipe(sys.argv[1])).summary_with_reason)
print(load_run(sys.argv[1], watcher=Printer()).base.rule.compute)
"""


class Notes(Watcher):
    """Keeps the notes of a run."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def with_auto(folder, name):
    return recipe_in(folder, name, "base.compute=auto", "adapter.dropout=0")


@pytest.fixture(scope="module")
def in_bf16(folder):
    """A run of `base.compute=auto` that was recorded with bf16 compute, and its notes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "bf16_speedup", lambda: 4.0)
        notes = Notes()
        run_recipe(with_auto(folder, "in-bf16"), watcher=notes)
    return folder / "in-bf16", notes.texts


@pytest.mark.parametrize(
    ("speedup", "dtype", "reason"),
    [
        (4.2, torch.bfloat16, "bf16 is 4.2 times as fast as fp32 here"),
        (1.1, torch.float32, "bf16 is only 1.1 times as fast as fp32 here"),
        (0.0, torch.float32, "no bf16 units here"),
    ],
)
def test_auto_is_bf16_where_it_is_clearly_faster(folder, monkeypatch, speedup, dtype, reason):
    monkeypatch.setattr(computing, "bf16_speedup", lambda: speedup)
    rule = new_rule(with_auto(folder, "new"))
    assert rule.compute is dtype
    assert f"(base.compute=auto: {reason}" in rule.summary_with_reason


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_dtype_that_is_set_is_used_without_measuring(folder, monkeypatch, name):
    monkeypatch.setattr(computing, "bf16_speedup", lambda: pytest.fail("it was measured"))
    rule = new_rule(recipe_in(folder, "new", f"base.compute={name}"))
    assert computing.computing_of(rule).compute == name
    assert "base.compute=auto" not in rule.reason


@pytest.mark.parametrize(("speedup", "products"), [(2.3, "onednn"), (1.1, "torch"), (0.0, "torch")])
def test_fp32_products_are_those_of_the_clearly_faster_library(
    folder, monkeypatch, speedup, products
):
    monkeypatch.setattr(computing, "onednn_speedup", lambda: speedup)
    rule = new_rule(recipe_in(folder, "new"))
    assert rule.products == products
    is_said = "compute fp32 by oneDNN" in rule.summary and "2.3 times" in rule.reason
    assert is_said == (products == "onednn")


@pytest.mark.parametrize("products", ["onednn", "torch"])
def test_the_library_of_products_is_recorded_and_kept(folder, monkeypatch, tmp_path, products):
    recorded, other = (2.3, 0.0) if products == "onednn" else (0.0, 2.3)
    monkeypatch.setattr(computing, "onednn_speedup", lambda: recorded)
    run = folder / f"by-{products}"
    run_recipe(recipe_in(folder, run.name))
    monkeypatch.setattr(computing, "onednn_speedup", lambda: other)
    loaded = load_run(run)
    layers = [m for m in loaded.model.modules() if isinstance(m, FrozenLinear)]
    assert {layer.products for layer in layers} == {products}
    result = merge(run, tmp_path / "merged", base="trained", dtype="fp32")
    assert result.written.is_exact

    resumed = folder / f"resumed-by-{products}"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "adapter")
    shutil.rmtree(resumed / "checkpoints" / "step-000012")
    run_recipe(recipe_in(folder, resumed.name))
    assert result_of(resumed) == result_of(run)


def test_a_run_says_and_records_how_it_computes(in_bf16):
    run, notes = in_bf16
    assert "compute bf16" in notes[0]
    assert "(base.compute=auto: bf16 is 4.0 times as fast as fp32 here)" in notes[0]
    record = json.loads((run / "recipe.json").read_text())
    assert record["computing"]["compute"] == "bf16"
    assert record["recipe"]["base"]["compute"] == "auto"
    assert "times" not in record["device"]


def test_what_is_done_with_a_run_computes_as_its_record_says(in_bf16, folder, tmp_path):
    run, _ = in_bf16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "bf16_speedup", lambda: pytest.fail("it was measured again"))
        assert load_run(run).base.rule.compute is torch.bfloat16
        assert merge(run, tmp_path / "merged").table
        resumed = folder / "resumed"
        shutil.copytree(run, resumed)
        shutil.rmtree(resumed / "adapter")
        shutil.rmtree(resumed / "checkpoints" / "step-000012")
        notes = Notes()
        run_recipe(with_auto(folder, "resumed"), watcher=notes)
    assert "compute bf16" in notes.texts[0]
    assert not any("bit-identical" in text for text in notes.texts)
    found, expected = result_of(resumed), result_of(run)
    assert (
        found["adapter/adapter_model.safetensors"] == expected["adapter/adapter_model.safetensors"]
    )


@pytest.mark.parametrize(("compute", "dtype"), [("auto", "fp32"), ("bf16", "bf16")])
def test_a_run_of_an_earlier_version_computed_in_fp32_unless_set(folder, tmp_path, compute, dtype):
    recipe = recipe_in(folder, "earlier", f"base.compute={compute}")
    record = {
        "recipe": recipe.to_dict(),
        "fingerprints": {},
        "micro_batch_tokens": 128,
        "device": "CPU, 1 thread: compute fp32",
    }
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    found = computing.computing_of(rule_of_run(recipe, RunFolder(tmp_path)))
    assert (found.compute, found.products) == (dtype, "torch")


def record_of(recipe, folder, **values):
    """The record of a run that has started."""
    record = {
        "recipe": recipe.to_dict(),
        "fingerprints": {},
        "micro_batch_tokens": 128,
        "device": "one line",
        "computing": values,
    }
    (folder / "recipe.json").write_text(json.dumps(record))
    return RunFolder(folder)


def test_a_run_that_started_on_a_gpu_computes_on_a_cpu_as_a_new_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(computing, "bf16_speedup", lambda: 0.0)
    recipe = recipe_in(folder, "of-a-gpu", "base.compute=auto")
    run = record_of(recipe, tmp_path, device="cuda", compute="bf16", products="torch")
    assert rule_of_run(recipe, run) == new_rule(recipe)
    assert rule_of_run(recipe, run).compute == torch.float32


@pytest.mark.parametrize(("has_onednn", "products"), [(True, "onednn"), (False, "torch")])
def test_recorded_products_need_their_library(folder, tmp_path, monkeypatch, has_onednn, products):
    monkeypatch.setattr(computing, "has_onednn", lambda: has_onednn)
    recipe = recipe_in(folder, "without-onednn")
    run = record_of(recipe, tmp_path, device="cpu", compute="fp32", products="onednn")
    assert rule_of_run(recipe, run).products == products


@pytest.mark.skipif(not has_bf16_units(), reason="bf16 would be slow on this processor")
def test_an_older_processor_computes_as_recorded_and_says_that_it_is_slow(in_bf16):
    run, _ = in_bf16
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ON_AN_OLDER_PROCESSOR, str(run)]
    asked = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    new, *notes, compute = asked.stdout.splitlines()
    assert "compute fp32" in new
    assert "(base.compute=auto: no bf16 units here" in new
    assert compute == "torch.bfloat16"
    assert sum("this processor has no bf16 units" in note for note in notes) == 1


def test_one_card_for_several_processes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(computing, "current", lambda: Processes(world=2))
    recipe = recipe_in(folder, "one-card", "device=cuda:1")
    with pytest.raises(DeviceError, match="device=cuda,"):
        rule_of_run(recipe, RunFolder(folder / "one-card"))
