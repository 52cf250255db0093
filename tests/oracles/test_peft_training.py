"""PEFT has the same losses with the same initial values, data and optimizer, for twenty steps.

The base of PEFT's model has the weights that ours dequantises to. PEFT's PiSSA and OLoRA decompose
an unquantised weight, so there the base is fp32. For LoftQ, PEFT's decomposition of the error of a
4-bit base equals ours with one iteration and alpha = r. For AdaLoRA see test_peft_adalora.py.
"""

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import _low_rank_decomposition
from torch.nn import functional as F

from qlora_lite.adapters.method import AdapterSettings
from qlora_lite.methods.dora import DoRA
from qlora_lite.methods.loftq import LoftQ, LoftQMethod
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.lora_plus import LoRAPlus
from qlora_lite.methods.offset import original
from qlora_lite.methods.olora import OLoRA
from qlora_lite.methods.pissa import PiSSA
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import FP32, NF4, Quant
from qlora_lite.model.settings import Base
from tests.dense_twin import dense_twin
from tests.tiny import save_tiny
from tests.workbench import CPU, Bench, batches_of

STEPS = 20
LR = 2e-3
TRAINED_IN_FP32 = {"rtol": 2e-5, "atol": 0.0}
"""After twenty steps of fp32 sums in another order, which Adam's normalisation enlarges."""

CASES: dict[str, tuple[AdapterSettings, Quant, dict[str, Any]]] = {
    "lora": (LoRA(rank=4, alpha=8), NF4(), {"lora_alpha": 8}),
    "rslora": (RsLoRA(rank=4, alpha=8), NF4(), {"lora_alpha": 8, "use_rslora": True}),
    "lora_plus": (LoRAPlus(rank=4, alpha=8), NF4(), {"lora_alpha": 8}),
    "dora": (DoRA(rank=4, alpha=8, dropout=0), NF4(), {"lora_alpha": 8, "use_dora": True}),
    "pissa": (PiSSA(rank=4, alpha=6), FP32(), {"lora_alpha": 6, "init_lora_weights": "pissa"}),
    "olora": (
        OLoRA(rank=4, alpha=6, dropout=0),
        FP32(),
        {"lora_alpha": 6, "init_lora_weights": "olora"},
    ),
    "loftq": (LoftQ(rank=4, alpha=4, iterations=1), NF4(), {"lora_alpha": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_has_the_same_losses(tmp_path, name):
    settings, quant, config = CASES[name]
    directory = save_tiny(tmp_path / "base")
    ours = Bench(directory, settings, quant, total=STEPS, lr=LR)
    theirs = peft_model(directory, quant, config)
    if "init_lora_weights" not in config:
        copy_start(theirs, ours)
    optimizer = peft_optimizer(theirs, settings)
    for number in range(STEPS):
        expected = peft_step(theirs, optimizer, number)
        assert ours.step() == pytest.approx(expected, rel=TRAINED_IN_FP32["rtol"]), number


def peft_model(directory, quant: Quant, config: dict[str, Any]) -> peft.PeftModel:
    """PEFT's adapter on every linear layer of the dense twin of our base."""
    twin = dense_twin(load_base(Base(model=str(directory), quant=quant), CPU).model)
    return peft.get_peft_model(
        twin, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    )


def copy_start(theirs: peft.PeftModel, ours: Bench) -> None:
    """Copy our A to PEFT (B is zero in both); for LoftQ, use PEFT's own decomposition."""
    state = theirs.state_dict()
    for path, layer in ours.attached.layers.items():
        a, b = (state[f"base_model.model.{path}.lora_{name}.default.weight"] for name in "AB")
        if isinstance(ours.method, LoftQMethod):
            error = original(layer.base) - layer.base.dense()
            found = _low_rank_decomposition(error, reduced_rank=len(a))
            a.copy_(found["R"])
            b.copy_(found["L"])
        else:
            a.copy_(layer.a)


def peft_optimizer(model: peft.PeftModel, settings: AdapterSettings) -> torch.optim.Optimizer:
    if settings.lr_ratio != 1:
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=settings.lr_ratio
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)


def peft_step(model: peft.PeftModel, optimizer: torch.optim.Optimizer, number: int) -> float:
    """One step over the same two micro-batches, in plain PyTorch."""
    batches = list(batches_of(number, rows=2))
    num_targets = sum(batch.num_targets for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch.input_ids).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum"
        )
        (loss / num_targets).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total / num_targets
