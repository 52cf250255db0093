"""The PEFT form: PEFT loads our files unchanged; adapters that cannot be folded are refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.adapters.peft import read_peft
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.rslora import RsLoRA
from tests.dense_twin import base_twin
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, perturbed, plain_logits

SETTINGS = [
    LoRA(rank=4, alpha=8),
    RsLoRA(rank=4, alpha=3),
    LoRA(rank=4, ranks={"0": 8, "1": 0}),
    LoRA(rank=4, targets="attention", train_norms=True),
    LoRA(rank=4, embedding_rank=2),
    LoRA(rank=4, train_modules=["lm_head"]),
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def directory(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ranks}-{s.targets}")
def test_peft_loads_our_files_and_gives_the_same_logits(tmp_path, directory, settings):
    base = Bench(directory, LoRA(rank=1))
    twin = base_twin(directory)
    ours = perturbed(directory, settings)
    theirs = peft.PeftModel.from_pretrained(twin, ours.save(tmp_path / "adapter"))
    assert not torch.allclose(ours.logits(), base.logits(), atol=1e-2)
    torch.testing.assert_close(plain_logits(theirs), ours.logits(), **CLOSE)


def test_scales_are_folded_and_all_ranks_are_equal(tmp_path, directory):
    ours = perturbed(directory, RsLoRA(rank=4, alpha=3, ranks={"0": 8, "1": 4}))
    folder = ours.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == list(ours.attached.layers)
    assert config["fan_in_fan_out"] is (directory.name == "gpt2")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(t.shape[0] == 8 for name, t in tensors.items() if name.endswith("lora_A.weight"))
    assert all(t.shape[1] == 8 for name, t in tensors.items() if name.endswith("lora_B.weight"))


def test_layers_of_rank_0_are_left_out(tmp_path, directory):
    folder = perturbed(directory, LoRA(rank=4, ranks={"1": 0})).save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not any(".1." in name for name in config["target_modules"])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_changed_base_is_refused(tmp_path, start):
    folder = perturbed(save_tiny(tmp_path / "llama"), LoRA(rank=4)).save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for harmless in ("gaussian", "eva", False):
        (folder / "adapter_config.json").write_text(
            json.dumps(config | {"init_lora_weights": harmless})
        )
        assert read_peft(folder).layers
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"{start}.*path_initial_model_for_weight_conversion"):
        read_peft(folder)


def test_a_directory_without_a_lora_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"not a PEFT adapter"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterError, match="IA3"):
        read_peft(tmp_path)
