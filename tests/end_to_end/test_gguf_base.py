"""GGUF files as bases: killed, continued, merged, and loaded by transformers and peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.causal import CausalModel
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import Killed, small_recipe, write_rows
from tests.workbench_gguf import tiny_gguf_model, write_model_gguf

STEPS = 3
IDS = torch.arange(100, 124)[None]
POSITIONS = torch.arange(24)[None]


class KilledAfterTheFirst(Watcher):
    def saved(self, step: int) -> None:
        if step == 1:
            raise Killed


def recipe_for(base: Path, folder: Path, name: str, *changes: str):
    data = write_rows(folder / "train.jsonl", 24)
    return small_recipe(
        base,
        data,
        folder / name,
        f"optim.steps={STEPS}",
        "optim.tokens_per_step=128",
        "checkpoints.every=1",
        "evaluation.every=3",
        "data.heldout_share=0.2",
        *changes,
    )


def trained(base: Path, folder: Path) -> RunFolder:
    """A run that was killed after its first step, and continued."""
    recipe = recipe_for(base, folder, "run")
    with pytest.raises(Killed):
        run_recipe(recipe, watcher=KilledAfterTheFirst())
    run_recipe(recipe)
    return RunFolder(folder / "run")


def native(run: RunFolder) -> bytes:
    return (run.adapter / "native.safetensors").read_bytes()


def check_the_files_of_a_merge(run: RunFolder, out: Path) -> None:
    result = merge(run.path, out, base="original")
    assert result.dtype == torch.bfloat16
    assert any("dequantised" in note for note in result.notes)
    assert "dequantised" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def check_a_merge_on_the_original(run: RunFolder, out: Path) -> None:
    """The files are the adapter on the dequantised weights, in bf16, and load anywhere."""
    check_the_files_of_a_merge(run, out)
    ours = load_run(run.path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a 12 b").input_ids == ours.tokenizer("a 12 b").input_ids
    assert tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_from_its_gguf_file(real_base, tmp_path):
    run = trained(real_base, tmp_path)
    run_recipe(recipe_for(real_base, tmp_path, "whole"))
    assert native(run) == native(RunFolder(tmp_path / "whole"))
    assert {"config.json", "tokenizer.json"} <= {p.name for p in run.base_files.iterdir()}
    check_a_merge_on_the_original(run, tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.real
def test_peft_puts_the_adapter_on_what_transformers_reads_from_the_file(real_base, tmp_path):
    recipe = recipe_for(real_base, tmp_path, "run", "base.quant=fp32")
    run_recipe(recipe)
    adapter = tmp_path / "run" / "adapter"
    code = (adapter / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {}
    exec(code.replace("THIS FOLDER", str(adapter)), names)
    theirs = names["model"].eval()
    ours = CausalModel(load_run(tmp_path / "run").base.model)
    with torch.no_grad():
        expected = ours.logits(ours.hidden(IDS, POSITIONS))
        found = theirs(input_ids=IDS).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_gemma_3_from_its_gguf_file(gemma_gguf, tmp_path):
    check_a_merge_on_the_original(trained(gemma_gguf, tmp_path), tmp_path / "merged")


def test_a_tiny_file_is_trained_and_merged_in_bf16_unless_told_otherwise(tmp_path):
    base = write_model_gguf(tmp_path / "base.gguf", tiny_gguf_model("llama"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "tok to " * n}) for n in range(3, 40)))
    recipe = small_recipe(base, rows, tmp_path / "run", "optim.steps=2", "data.format=text")
    run_recipe(recipe)
    check_the_files_of_a_merge(RunFolder(tmp_path / "run"), tmp_path / "merged")
    result = merge(tmp_path / "run", tmp_path / "fp32", base="original", dtype="fp32")
    assert result.dtype == torch.float32
