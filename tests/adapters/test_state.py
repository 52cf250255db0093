"""Adapters as files: PEFT reads ours untouched, and we read PEFT's."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.adapters.attach import attach
from qlora_lite.adapters.catalogue import method_for
from qlora_lite.adapters.lora import LoRA
from qlora_lite.adapters.rslora import RsLoRA
from qlora_lite.adapters.state import begin_from, read_peft, save_adapter
from qlora_lite.foundation import device
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.load import Base, load_base
from qlora_lite.model.quant import NF4
from qlora_lite.model.targets import linear_specs
from tests.dense_twin import dense_twin
from tests.tiny import save_tiny
from tests.workbench import Bench

IDS = torch.arange(5, 45).view(2, 20)
POSITIONS = torch.arange(20).expand(2, 20)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def directory(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / request.param, request.param)


def load(directory, settings):
    base = load_base(Base(model=str(directory), quant=NF4()), device.choose("cpu"))
    specs = linear_specs(base.model)
    dtype = device.DTYPES.get(settings.dtype, torch.bfloat16)
    return base, attach(base.model, method_for(settings), specs, 0, dtype)


def trained(directory, settings):
    """A model whose every trained parameter has moved."""
    base, attached = load(directory, settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return base, attached


def logits(base):
    model = CausalModel(base.model)
    with torch.no_grad():
        return model.logits(model.hidden(IDS, POSITIONS))


def save(folder, directory, attached):
    folder.mkdir()
    save_adapter(
        folder,
        attached,
        base=str(directory),
        revision=None,
        fan_in_fan_out=directory.name == "gpt2",
        sidecar={"adapter": attached.method.settings.model_dump(mode="json")},
    )
    return folder


SETTINGS = [
    LoRA(rank=4, alpha=8),
    RsLoRA(rank=4, alpha=3),
    LoRA(rank=4, ranks={"0": 8, "1": 0}),
    LoRA(rank=4, targets="attention", train_norms=True),
    LoRA(rank=4, embedding_rank=2),
    LoRA(rank=4, train_modules=["lm_head"]),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ranks}-{s.targets}")
def test_peft_loads_it_untouched_and_gives_the_same_logits(tmp_path, directory, settings):
    bare, _ = load(directory, LoRA(rank=1))
    twin = dense_twin(_bare(directory))
    base, attached = trained(directory, settings)
    expected = logits(base)
    folder = save(tmp_path / "adapter", directory, attached)
    theirs = peft.PeftModel.from_pretrained(twin, folder).eval()
    with torch.no_grad():
        got = theirs(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    assert not torch.allclose(expected, logits(bare), atol=1e-2)
    torch.testing.assert_close(got, expected, **CLOSE)


def _bare(directory):
    return load_base(Base(model=str(directory), quant=NF4()), device.choose("cpu")).model


def test_what_is_saved_is_normalised_for_every_consumer(tmp_path, directory):
    _, attached = trained(directory, RsLoRA(rank=4, alpha=3, ranks={"0": 8, "1": 4}))
    folder = save(tmp_path / "adapter", directory, attached)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == list(attached.layers)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(t.shape[0] == 8 for name, t in tensors.items() if name.endswith("lora_A.weight"))
    assert all(t.shape[1] == 8 for name, t in tensors.items() if name.endswith("lora_B.weight"))


def test_layers_of_rank_0_are_left_out(tmp_path, directory):
    _, attached = trained(directory, LoRA(rank=4, ranks={"1": 0}))
    folder = save(tmp_path / "adapter", directory, attached)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not any(".1." in name for name in config["target_modules"])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"0": 2}}], ids=str)
def test_an_adapter_trained_by_peft_begins_ours_with_the_same_logits(tmp_path, directory, options):
    names = ["c_attn", "c_fc"] if directory.name == "gpt2" else ["q_proj", "down_proj"]
    if "rank_pattern" in options:
        options = {"rank_pattern": {names[0]: 2}, "alpha_pattern": {names[1]: 7}}
    config = peft.LoraConfig(r=4, lora_alpha=5, target_modules=names, **options)
    twin = dense_twin(_bare(directory))
    theirs = peft.get_peft_model(twin, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
        expected = theirs(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    theirs.save_pretrained(tmp_path / "theirs")
    base, attached = load(directory, LoRA(rank=4, targets=names, dtype="fp32"))
    begin_from(attached, tmp_path / "theirs")
    torch.testing.assert_close(logits(base), expected, **CLOSE)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ranks}-{s.targets}")
def test_our_own_state_comes_back_to_the_bit(tmp_path, directory, settings):
    base, attached = trained(directory, settings)
    folder = save(tmp_path / "adapter", directory, attached)
    again, fresh = load(directory, settings)
    begin_from(fresh, folder)
    assert torch.equal(logits(again), logits(base))
    other, native = load(directory, settings)
    native.load_state(load_file(folder / "native.safetensors"))
    assert torch.equal(logits(other), logits(base))


def test_a_matrix_trained_whole_is_stored_as_its_base_stores_it(tmp_path):
    """GPT-2's output projection is square, so that only the numbers show which way it lies."""
    directory = save_tiny(tmp_path / "gpt2", "gpt2")
    settings = LoRA(rank=4, train_modules=["*.0.attn.c_proj"], dtype="fp32")
    base, attached = trained(directory, settings)
    folder = save(tmp_path / "adapter", directory, attached)
    theirs = peft.PeftModel.from_pretrained(dense_twin(_bare(directory)), folder).eval()
    with torch.no_grad():
        got = theirs(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(got, logits(base), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    again, fresh = load(directory, settings)
    begin_from(fresh, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(base), **CLOSE)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_changed_base_is_refused(tmp_path, start):
    directory = save_tiny(tmp_path / "llama")
    folder = save(tmp_path / "adapter", directory, trained(directory, LoRA(rank=4))[1])
    config = json.loads((folder / "adapter_config.json").read_text())
    for harmless in ("gaussian", "eva", False):
        (folder / "adapter_config.json").write_text(
            json.dumps(config | {"init_lora_weights": harmless})
        )
        assert read_peft(folder).layers
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"{start}.*path_initial_model_for_weight_conversion"):
        read_peft(folder)


def test_a_tensor_that_finds_no_place_is_an_error(tmp_path, directory):
    _, attached = trained(directory, LoRA(rank=4))
    folder = save(tmp_path / "adapter", directory, attached)
    _, narrower = load(directory, LoRA(rank=4, targets="attention"))
    with pytest.raises(AdapterError, match=r"tensors that this recipe does not train.*targets"):
        begin_from(narrower, folder)
    with pytest.raises(AdapterError, match="differ in"):
        narrower.load_state(load_file(folder / "native.safetensors"))


def test_a_larger_rank_is_an_error_that_says_which_is_needed(tmp_path, directory):
    _, attached = trained(directory, LoRA(rank=8))
    folder = save(tmp_path / "adapter", directory, attached)
    _, smaller = load(directory, LoRA(rank=4))
    with pytest.raises(AdapterError, match=r"adapter\.rank=8"):
        begin_from(smaller, folder)


def test_an_adapter_of_another_base_is_an_error(tmp_path, directory):
    _, attached = trained(directory, LoRA(rank=4))
    folder = save(tmp_path / "adapter", directory, attached)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    tensors[name] = torch.zeros(4, 17)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "native.safetensors").unlink()
    _, other = load(directory, LoRA(rank=4))
    with pytest.raises(AdapterError, match="another base model"):
        begin_from(other, folder)


def test_what_is_no_lora_directory_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"not an adapter directory"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterError, match="IA3"):
        read_peft(tmp_path)


def test_the_zeros_that_pad_an_adapter_do_not_become_dead_components(tmp_path):
    directory = save_tiny(tmp_path / "base")
    first = Bench(directory, LoRA(rank=6, ranks={"0": 2}, embedding_rank=2), lr=1e-2)
    first.step()
    folder = first.save(tmp_path / "adapter")
    second = Bench(directory, LoRA(rank=6, embedding_rank=2))
    begin_from(second.attached, folder)
    torch.testing.assert_close(second.logits(), first.logits(), rtol=1e-5, atol=1e-5)
    second.step()
    assert all(layer.b.any(dim=0).all() for layer in second.attached.layers.values())
    same_ranks = Bench(directory, LoRA(rank=6, ranks={"0": 2}, alpha=9, embedding_rank=2))
    begin_from(same_ranks.attached, folder)
    torch.testing.assert_close(same_ranks.logits(), first.logits(), rtol=1e-5, atol=1e-5)


def test_pefts_copy_of_the_head_is_recognised_as_the_bases(tmp_path):
    directory = save_tiny(tmp_path / "base")
    twin = dense_twin(_bare(directory))
    twin.save_pretrained(tmp_path / "plain")
    config = peft.LoraConfig(r=4, lora_alpha=5, target_modules=["q_proj", "lm_head"])
    theirs = peft.get_peft_model(twin, config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        expected = theirs.eval()(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored
    base, attached = load(directory, LoRA(rank=4, targets=["q_proj", "lm_head"], dtype="fp32"))
    begin_from(attached, tmp_path / "theirs")
    torch.testing.assert_close(logits(base), expected, **CLOSE)
    stored["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(stored, tmp_path / "theirs" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="holds another weight for lm_head"):
        begin_from(attached, tmp_path / "theirs")
