"""LoRA+: B trains at a multiple of the learning rate of A."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from qlora_lite.methods.lora_plus import LoRAPlus
from qlora_lite.model.quant import FP32
from tests.tiny import save_tiny
from tests.workbench import Bench


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def test_the_learning_rates_are_those_of_peft(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    twin = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=LoRAPlus().lr_ratio
    )
    name_of = {id(p): n for n, p in twin.named_parameters()}
    theirs = {
        name_of[id(p)].partition(".lora_")[2][0].lower(): group["lr"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    groups = Bench(directory, LoRAPlus(rank=4, targets=["q_proj"])).attached.groups()
    ours = {name[-1]: 1e-3 * group.lr_factor for group in groups for name in group.names}
    assert ours == pytest.approx(theirs)


def test_a_step_of_adam_moves_b_sixteen_times_as_far_as_a(directory):
    """A constant gradient moves every entry by the learning rate."""
    bench = Bench(directory, LoRAPlus(rank=4), FP32())
    parameters = bench.attached.parameters()
    before = copy.deepcopy({name: p.detach() for name, p in parameters.items()})
    for parameter in parameters.values():
        bench.engine.set_gradient(parameter, torch.ones_like(parameter))
    bench.optimizer.step(1e-3, torch.Generator())
    for name, parameter in parameters.items():
        distance = 16e-3 if name.endswith(".b") else 1e-3
        moved = before[name] - parameter.detach()
        torch.testing.assert_close(moved, torch.full_like(moved, distance), rtol=1e-3, atol=1e-6)
