"""PEFT's AdaLoRA: the same losses and the same triplets over a whole schedule."""

import peft
import pytest
import torch
from torch.nn import functional as F

from qlora_lite.methods.adalora import AdaLoRA
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from tests.dense_twin import dense_twin
from tests.tiny import save_tiny
from tests.workbench import CPU, Bench, batches_of

STEPS, LR = 20, 2e-3
NO_CLIPPING = 1e9
"""PEFT's importance sees clipped gradients and ours unclipped ones, so nothing is clipped."""
WEIGHT = 0.1


def test_peft_has_the_same_losses_and_keeps_the_same_triplets(tmp_path):
    directory = save_tiny(tmp_path / "base")
    settings = AdaLoRA(
        rank=6, target_rank=3, alpha=8, warmup=3, final=5, every=2, orthogonality=WEIGHT
    )
    ours = Bench(directory, settings, total=STEPS, lr=LR, max_grad_norm=NO_CLIPPING)
    twin = dense_twin(load_base(Base(model=str(directory)), CPU).model)
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        tinit=3,
        tfinal=5,
        deltaT=2,
        total_step=STEPS,
        lora_alpha=8,
        orth_reg_weight=WEIGHT,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(twin, config)
    state = theirs.state_dict()
    for path, layer in ours.attached.layers.items():
        for name, own in (("A", layer.a), ("B", layer.b)):
            state[f"base_model.model.{path}.lora_{name}.default"].copy_(own)
        state[f"base_model.model.{path}.lora_E.default"].zero_()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    for number in range(STEPS):
        expected = peft_step(theirs, optimizer, number)
        assert ours.step() == pytest.approx(expected, rel=5e-5), number
    for path, layer in ours.attached.layers.items():
        found = state[f"base_model.model.{path}.lora_E.default"].flatten() != 0
        assert torch.equal(layer.e.detach() != 0, found), path


def peft_step(model, optimizer, number):
    batches = list(batches_of(number, rows=2))
    num_targets = sum(batch.num_targets for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch.input_ids).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum"
        )
        total += loss.item()
        penalty = orthogonality(model) if batch is batches[-1] else 0.0
        (loss / num_targets + penalty).backward()
    optimizer.step()
    model.base_model.update_and_allocate(number + 1)
    optimizer.zero_grad()
    return total / num_targets


def orthogonality(model):
    """As PEFT adds it to a loss that its model returns."""
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
    return WEIGHT * sum(terms) / len(terms)
