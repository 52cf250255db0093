"""Every listed family as transformers saves it: loaded, trained, merged and read back."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_lite.adapters.plan import plan_adapter
from qlora_lite.export.verify import EXACT
from qlora_lite.foundation import device
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.facts import facts_of, read_facts
from qlora_lite.model.linears import READ_DIRECTLY
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import FP32
from qlora_lite.model.settings import Base
from qlora_lite.model.towers import text_tower
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in, write_rows
from tests.families import ALSO_TRAINED, LISTED, tiny_config, tiny_of
from tests.tiny import tiny_tokenizer

QUICK = ("gpt_neox", "mixtral", "gemma3")

CHANGES = {
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
    },
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "mistral": {"sliding_window": 16},
}
"""Scaling, caps, windows that matter for 40 tokens, and layers that share keys and values."""

IDS = torch.arange(5, 85).view(2, 40)


def families(tried=(*LISTED, *ALSO_TRAINED), quick=QUICK):
    """Every family of `tried`; those that are not quick are slow tests."""
    for family in tried:
        marks = () if family in quick else (pytest.mark.slow,)
        yield pytest.param(family, id=family, marks=marks)


def save(family: str, folder: Path):
    """A tiny model as transformers saves it, with tokenizer and rows."""
    model = tiny_of(family, **CHANGES.get(family, {}))
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "train.jsonl", num_rows=24)
    return model


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def reload(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("family", families())
def test_two_steps_are_trained_merged_and_read_back(tmp_path, family):
    own = save(family, tmp_path)
    base = Base(model=str(tmp_path / "base"), quant=FP32())
    unquantised = load_base(base, device.choose("cpu")).model
    assert agree(logits_of(unquantised), logits_of(reload(tmp_path / "base")))

    run_recipe(recipe_in(tmp_path, "run", "optim.steps=2"))
    trained = load_run(tmp_path / "run")
    causal = CausalModel(trained.model)
    with torch.no_grad():
        hidden = causal.hidden(IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
        predicted = causal.logits(hidden)[:, :-1].flatten(0, 1)
        own_loss = trained.model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss = F.cross_entropy(predicted.float(), IDS[:, 1:].flatten())
    assert loss.item() == pytest.approx(own_loss.item(), rel=EXACT)
    assert not agree(logits_of(trained.model), logits_of(own))  # quantised and trained

    merge(tmp_path / "run", tmp_path / "trained", base="trained", dtype="fp32")
    assert agree(logits_of(reload(tmp_path / "trained")), logits_of(trained.model))

    merge(tmp_path / "run", tmp_path / "original", base="original", verify=False)
    stored, written = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "original")
    assert written.keys() == stored.keys()
    targets = {f"{path}.weight" for path in trained.attached.layers}
    facts = read_facts(Base(model=str(tmp_path / "base")))
    changed = {name for name in stored if not torch.equal(stored[name], written[name])}
    names = facts.match_names(list(stored))
    assert {names[name] for name in changed} == targets
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["model_type"] == own.config.model_type


@pytest.mark.parametrize("family", families(LISTED, tuple(LISTED)))
def test_all_linear_selects_what_peft_calls_linear_in_the_text_tower(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    facts = facts_of(tiny_config(family))
    tower, head = text_tower(model), model.get_output_embeddings()
    prefix = next(path for path, module in model.named_modules() if module is tower)
    special = {
        f"{path}.{child}"
        for path, module in model.named_modules()
        for child in READ_DIRECTLY.get(type(module).__name__, ())
    }
    expected = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if path.startswith(f"{prefix}.") and path not in special
    }
    plan = plan_adapter(method_for(LoRA(rank=2, targets="all-linear")), facts)
    assert set(plan.layers) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral"])
@pytest.mark.parametrize("quant", ["int8", "fp32"])
def test_its_adapter_is_the_same_in_peft(tmp_path, family, quant):
    save(family, tmp_path)
    run_recipe(recipe_in(tmp_path, "run", "optim.steps=2", f"base.quant={quant}"))
    merge(tmp_path / "run", tmp_path / "merged", base="original", dtype="fp32", verify=False)
    other = PeftModel.from_pretrained(reload(tmp_path / "base"), tmp_path / "run" / "adapter")
    assert agree(logits_of(other), logits_of(reload(tmp_path / "merged")))
    if quant == "fp32":
        assert agree(logits_of(other), logits_of(load_run(tmp_path / "run").model))
