"""PEFT adapters, written by PEFT, and loralib checkpoints, written by hand."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import AdapterError, BaseModelError
from qlora_lite.inspection.foreign_adapters import open_loralib, open_peft
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import NF4
from qlora_lite.model.settings import Base
from tests.model.test_prequantised import bitsandbytes_config
from tests.tiny import save_tiny

CPU = choose("cpu")
EXACT = {"atol": 0, "rtol": 0}
FP32 = {"atol": 1e-5, "rtol": 1e-5}


def write_peft(directory, base, seed=0, **settings):
    """Write a LoRA adapter with random factors; return its model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "c_attn": 7}},
        {"alpha_pattern": {"down_proj": 3, "c_proj": 3}},
    ],
    ids=["plain", "ranks and rslora", "alphas"],
)
def test_a_peft_adapter_has_the_deltas_of_peft_and_the_weights_of_its_base(
    tmp_path, tiny_llama, tiny_gpt2, family, settings
):
    base = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]
    model = write_peft(tmp_path / "adapter", base, **settings)
    found = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    assert found.notes == []
    modules = dict(model.base_model.model.named_modules())
    for path, shape in found.shapes.items():
        delta, module = found.read(path), modules[path]
        theirs = module.get_delta_weight("default")
        weight = module.base_layer.weight
        if family == "gpt2":  # as Conv1D stores it
            theirs, weight = theirs.T, weight.T
        assert delta.shape == shape == theirs.shape
        assert_close(delta.pair.up @ delta.pair.down, theirs, **FP32)
        assert_close(delta.weight, weight.detach(), **EXACT)
        assert delta.rank == module.r["default"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_peft_dora_adapter_has_the_deltas_of_its_merge(tmp_path, tiny_llama, tiny_gpt2, family):
    base = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]
    model = write_peft(tmp_path / "adapter", base, use_dora=True)
    found = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    modules = dict(model.base_model.model.named_modules())
    before = {path: modules[path].base_layer.weight.detach().clone() for path in found.shapes}
    model.merge_adapter()
    for path in found.shapes:
        theirs = modules[path].base_layer.weight.detach() - before[path]
        delta = found.read(path)
        assert_close(delta.dense, theirs.T if family == "gpt2" else theirs, **FP32)
        assert delta.rank == 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/where"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    alone = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    with pytest.raises(AdapterError, match=r"is a DoRA adapter.*--base MODEL"):
        alone.read(next(iter(alone.shapes)))


def test_layers_are_ordered_by_depth(tmp_path):
    base = save_tiny(tmp_path / "base", num_hidden_layers=12)
    write_peft(tmp_path / "adapter", base, target_modules=["q_proj"])
    found = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    assert list(found.shapes) == [f"model.layers.{n}.self_attn.q_proj" for n in range(12)]


def test_an_embedding_is_a_layer_from_tokens_to_features(tmp_path, tiny_llama):
    model = write_peft(tmp_path / "adapter", tiny_llama, target_modules=["embed_tokens"])
    found = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    assert found.shapes == {"model.embed_tokens": (64, 400)}
    delta = found.read("model.embed_tokens")
    module = model.base_model.model.model.embed_tokens
    theirs = module.get_delta_weight("default")
    assert_close(delta.pair.up @ delta.pair.down, theirs.T, **FP32)
    assert_close(delta.weight, module.base_layer.weight.detach().T, **EXACT)


def test_a_tied_head_has_the_weight_of_the_embedding(tmp_path, tiny_tied_llama):
    write_peft(tmp_path / "adapter", tiny_tied_llama, target_modules=["lm_head"])
    found = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    model = AutoModelForCausalLM.from_pretrained(tiny_tied_llama, dtype=torch.float32)
    assert_close(found.read("lm_head").weight, model.lm_head.weight.detach(), **EXACT)


def test_an_adapter_without_its_base_has_pairs_and_no_weights(tmp_path, tiny_llama):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    write_peft(tmp_path / "adapter", base)
    base.rename(tmp_path / "moved")
    alone = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    path = next(iter(alone.shapes))
    assert alone.read(path).weight is None
    assert alone.num_bytes(path) == 0
    assert "--base" in alone.notes[0]
    assert str(base) in alone.notes[0]
    given = open_peft(str(tmp_path / "adapter"), str(tmp_path / "moved"), CPU, [])
    assert given.read(path).weight.shape == given.shapes[path]
    assert given.num_bytes(path) == 4 * given.read(path).weight.numel()
    assert given.base.fingerprint


def test_an_unreadable_recorded_base_is_a_note_and_a_given_one_an_error(tmp_path, tiny_llama):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    write_peft(tmp_path / "adapter", base)
    (base / "model.safetensors").write_bytes(b"cut")
    found = open_peft(str(tmp_path / "adapter"), None, CPU, [])
    assert "model.safetensors is damaged" in found.notes[0]
    with pytest.raises(BaseModelError, match="damaged"):
        open_peft(str(tmp_path / "adapter"), str(base), CPU, [])


def test_a_quantised_base_is_dequantised(tmp_path, tiny_llama):
    packed = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=bitsandbytes_config(NF4())
    )
    packed.save_pretrained(tmp_path / "packed")
    write_peft(tmp_path / "adapter", tiny_llama, target_modules=["o_proj"])
    found = open_peft(str(tmp_path / "adapter"), str(tmp_path / "packed"), CPU, [])
    here = load_base(Base(model=str(tiny_llama), quant=NF4()), CPU).model
    path = "model.layers.1.self_attn.o_proj"
    assert_close(found.read(path).weight, here.get_submodule(path).dense(), **EXACT)


def test_another_base_is_refused(tmp_path, tiny_llama):
    write_peft(tmp_path / "adapter", tiny_llama)
    narrow = save_tiny(tmp_path / "narrow", intermediate_size=96)
    with pytest.raises(AdapterError, match=r"down_proj.* has 96 to 64 there.*--base"):
        open_peft(str(tmp_path / "adapter"), str(narrow), CPU, [])
    short = save_tiny(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(AdapterError, match=r"layers\.1.* has no such layer"):
        open_peft(str(tmp_path / "adapter"), str(short), CPU, [])


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 100])
def test_a_damaged_adapter_is_named(tmp_path, tiny_llama, file, content):
    write_peft(tmp_path / "adapter", tiny_llama)
    (tmp_path / "adapter" / file).write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter.* is damaged"):
        open_peft(str(tmp_path / "adapter"), None, CPU, [])


def test_settings_without_alpha_are_damaged(tmp_path, tiny_llama):
    write_peft(tmp_path / "adapter", tiny_llama)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    for wrong in ({}, {"lora_alpha": 4, "alpha_pattern": {"q_proj": "x"}}, {"lora_alpha": [4]}):
        file.write_text(json.dumps(config | wrong))
        with pytest.raises(AdapterError, match=r"is damaged.*alpha"):
            open_peft(str(tmp_path / "adapter"), None, CPU, [])


def test_numbers_that_are_not_finite_are_refused(tmp_path, tiny_llama):
    model = write_peft(tmp_path / "adapter", tiny_llama)
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data[3, 1] = np.nan
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.lora_B.* not finite"):
        open_peft(str(tmp_path / "adapter"), None, CPU, [])


# -- loralib ---------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_loralib(file, num_parts, d_out, d_in, path="transformer.h.0.attn.c_attn"):
    a, b = random(num_parts * 3, d_in), random(num_parts * d_out, 3, seed=1)
    torch.save({f"{path}.lora_A": a, f"{path}.lora_B": b}, file)
    return str(file)


def test_the_parts_of_a_fused_weight_have_their_own_rows(tmp_path, tiny_gpt2):
    file = write_loralib(tmp_path / "lora.pt", 3, 64, 64)
    found = open_loralib(file, str(tiny_gpt2), 6, CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    whole = model.transformer.h[0].attn.c_attn.weight.detach().T
    weights = [found.read(f"transformer.h.0.attn.c_attn[{part}]").weight for part in range(3)]
    assert_close(torch.cat(weights), whole, **EXACT)
    assert found.notes == []
    assert found.is_scaled


def test_some_parts_of_a_fused_weight_have_no_known_rows(tmp_path, tiny_gpt2):
    """As the paper adapts GPT-2: queries and values of three."""
    file = write_loralib(tmp_path / "lora.pt", 2, 64, 64)
    found = open_loralib(file, str(tiny_gpt2), 6, CPU)
    assert found.read("transformer.h.0.attn.c_attn[1]").weight is None
    assert "for 2 pairs" in found.notes[0]


def test_a_linear_layer_of_loralib_has_its_weight(tmp_path, tiny_gpt2):
    file = write_loralib(tmp_path / "lora.pt", 1, 64, 256, "transformer.h.1.mlp.c_proj")
    found = open_loralib(file, str(tiny_gpt2), None, CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    expected = model.transformer.h[1].mlp.c_proj.weight.detach().T
    assert_close(found.read("transformer.h.1.mlp.c_proj").weight, expected, **EXACT)
    assert not found.is_scaled
    assert "alpha" in found.notes[0]


def test_names_without_the_decoders_own_are_found(tmp_path, tiny_gpt2):
    file = write_loralib(tmp_path / "lora.pt", 1, 64, 256, "h.1.mlp.c_proj")
    found = open_loralib(file, str(tiny_gpt2), 3, CPU)
    assert found.read("h.1.mlp.c_proj").weight.shape == (64, 256)


def test_factors_of_another_base_are_refused(tmp_path, tiny_gpt2):
    file = write_loralib(tmp_path / "lora.pt", 3, 64, 80)
    with pytest.raises(AdapterError, match="from 80 to 192 features"):
        open_loralib(file, str(tiny_gpt2), 3, CPU)
