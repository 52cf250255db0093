"""The DeepSpeed configuration that follows from a recipe, and an own file on top of it."""

import json

import pytest
import torch

from qlora_lite.foundation.errors import DeviceError, RecipeError
from qlora_lite.offload import zero
from qlora_lite.offload.settings import ZeRO2, ZeRO3
from qlora_lite.offload.zero import configuration, require_available, require_valid

CPU, CARD = torch.device("cpu"), torch.device("cuda")


def own(folder, **values):
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    return ZeRO2(config=str(path))


def test_deepspeed_casts_nothing_and_sees_single_micro_batches():
    config = configuration(ZeRO2(), 0.5, CARD)
    assert not config.keys() & {"bf16", "fp16", "optimizer", "scheduler"}
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(("device", "pinned"), [(CPU, False), (CARD, True)])
def test_host_memory_is_pinned_for_a_card_only(device, pinned):
    offload = ZeRO3(parameters="cpu", optimizer="nvme", nvme_path="/disk")
    sections = configuration(offload, 1.0, device)["zero_optimization"]
    assert sections["offload_param"] == {"device": "cpu", "pin_memory": pinned}
    assert sections["offload_optimizer"]["device"] == "nvme"
    assert sections["offload_optimizer"]["nvme_path"] == "/disk"
    assert sections["offload_optimizer"]["pin_memory"] is pinned


def test_values_of_an_own_file_win_over_ours(tmp_path):
    values = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 77},
        "wall_clock_breakdown": 1,
    }
    config = configuration(own(tmp_path, **values), 1.0, CPU)
    assert config["zero_optimization"]["reduce_bucket_size"] == 77
    assert config["wall_clock_breakdown"] == 1


@pytest.mark.parametrize(
    "value",
    [
        {"train_batch_size": "auto", "gradient_clipping": "auto"},
        {"gradient_clipping": 1.0},
        {"fp16": {"enabled": False}},
    ],
)
def test_an_own_file_may_repeat_the_recipe_or_leave_it_to_us(tmp_path, value):
    config = configuration(own(tmp_path, **value), 1.0, CPU)
    assert config == configuration(ZeRO2(), 1.0, CPU)


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        ({"train_batch_size": 32}, "optim.tokens_per_step"),
        ({"train_micro_batch_size_per_gpu": 4}, "optim.tokens_per_step"),
        ({"gradient_accumulation_steps": 4}, "optim.tokens_per_step"),
        ({"gradient_clipping": 0.25}, "1.0 .optim.max_grad_norm"),
        ({"optimizer": {"type": "AdamW"}}, "optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "optim"),
        ({"bf16": {"enabled": True}}, "base.compute"),
        ({"fp16": {"enabled": True}}, "base.compute"),
        ({"zero_optimization": {"stage": 3}}, "3.*2 .offload"),
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"zero_force_ds_cpu_optimizer": True}, "True, and the recipe has False"),
        ({"zero_optimisation": {"stage": 2}}, "Allowed: zero_optimization"),
        ({"activation_checkpointing": {}}, "not passed on"),
    ],
)
def test_what_contradicts_the_recipe_is_refused_with_both_values(tmp_path, value, ours):
    with pytest.raises(RecipeError, match=ours) as caught:
        configuration(own(tmp_path, **value), 1.0, CPU)
    assert next(iter(value)) in str(caught.value)


def test_a_disk_needs_a_folder_and_the_library_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(zero.shutil, "which", lambda name: f"/usr/bin/{name}")
    missing = ZeRO3(parameters="nvme", nvme_path=str(tmp_path / "missing"))
    on_disk = configuration(ZeRO3(parameters="nvme", nvme_path=str(tmp_path)), 1.0, CPU)
    with pytest.raises(RecipeError, match="nvme_path"):
        require_available(configuration(missing, 1.0, CPU))
    monkeypatch.setattr(zero, "_has_libaio", lambda: False)
    with pytest.raises(DeviceError, match="libaio-dev"):
        require_available(on_disk)
    monkeypatch.setattr(zero.shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="ninja"):
        require_available(on_disk)


@pytest.mark.parametrize("path", [None, "/no/such/folder"])
def test_an_own_file_that_uses_a_disk_needs_the_same(tmp_path, path):
    section = {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": path}}
    config = configuration(own(tmp_path, zero_optimization=section), 1.0, CPU)
    with pytest.raises(RecipeError, match="nvme_path"):
        require_available(config)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"reduce_bucket": 5}, "zero_optimization.reduce_bucket"),
        ({"offload_optimizer": {"device": "disk"}}, "zero_optimization.offload_optimizer.device"),
    ],
)
def test_a_section_that_deepspeed_does_not_accept_is_refused(tmp_path, section, message):
    file = own(tmp_path, zero_optimization={"stage": 2} | section)
    with pytest.raises(RecipeError, match=message):
        require_valid(configuration(file, 1.0, CPU), str(file.config))


def test_our_own_section_is_one_that_deepspeed_accepts():
    for offload in (ZeRO2(optimizer="cpu"), ZeRO3(parameters="nvme", nvme_path="/disk")):
        require_valid(configuration(offload, 1.0, CARD), "ours")
