"""The families of the recipes, Gemma 3 and Mixtral: in NF4 and int8, killed, continued, merged."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lite.model.causal import CausalModel
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import Killed, Killer, small_recipe, write_rows
from tests.tiny import save_tiny

RECIPES = {
    "gpt2": {"family": "gpt2", "tied": True},
    "qwen3_0_6b": {"family": "qwen3", "tied": True},
    "qwen3_8b": {"family": "qwen3", "tied": False, "num_shards": 2},
    "llama3_1_8b": {"family": "llama", "tied": False, "dtype": torch.bfloat16},
    "mistral_7b": {"family": "mistral", "tied": False},
    "gemma3_1b": {"family": "gemma3_text", "tied": True},
    "mixtral_8x7b": {"family": "mixtral", "tied": False},
}


def cases():
    """Both precisions of every family. One of the recipes' runs by default, the rest are slow."""
    quick = dict(zip(RECIPES, ("nf4", "nf4", "int8", "nf4", "int8"), strict=False))
    for name in RECIPES:
        for quant in ("nf4", "int8"):
            marks = () if quick.get(name) == quant else (pytest.mark.slow,)
            yield pytest.param(name, quant, id=f"{name}-{quant}", marks=marks)


@pytest.mark.parametrize(("name", "quant"), list(cases()))
def test_a_killed_and_continued_run_learns_and_merges_to_the_same_logits(tmp_path, name, quant):
    save_tiny(tmp_path / "base", **RECIPES[name])
    data = write_rows(tmp_path / "train.jsonl")
    recipe = small_recipe(
        tmp_path / "base", data, tmp_path / "run", f"base.quant={quant}", "optim.lr=1e-2"
    )
    with pytest.raises(Killed):
        run_recipe(recipe, watcher=Killer())
    run_recipe(recipe)
    losses = [e["loss"] for e in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in e]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])

    result = merge(tmp_path / "run", tmp_path / "merged", base="trained", dtype="fp32")
    ids = torch.arange(5, 45).view(1, 40)
    positions = torch.arange(40)[None]
    merged = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32).eval()
    ours = CausalModel(load_run(tmp_path / "run").base.model)
    with torch.no_grad():
        expected = ours.logits(ours.hidden(ids, positions))
        got = merged(input_ids=ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
