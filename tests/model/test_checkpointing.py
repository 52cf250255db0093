"""Checkpointing saves less for backward and changes no result."""

import pytest
import torch
from torch import nn

from qlora_lite.foundation.device import choose
from qlora_lite.model.checkpointing import before_each_layer, enable_checkpointing
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from tests.tiny import save_tiny


class Shifted(nn.Module):
    """A frozen layer whose output is multiplied by a trained vector."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.zeros(base.d_out))

    def forward(self, x):
        return self.base(x) * (1 + self.shift)


def step(directory, checkpointed: bool):
    model = load_base(Base(model=str(directory)), choose("cpu")).model
    for path, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear) and path.endswith((".down_proj", "mlp.c_proj")):
            model.set_submodule(path, Shifted(module))
    if checkpointed:
        enable_checkpointing(model)
    num_saved = 0

    def count(tensor):
        nonlocal num_saved
        num_saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        ids = torch.arange(40)[None]
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return loss.detach(), gradients, num_saved


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_loss_and_gradients_are_equal_bit_for_bit_and_less_is_saved(tmp_path, family):
    settings = {"attn_pdrop": 0.5, "resid_pdrop": 0.5} if family == "gpt2" else {}
    directory = save_tiny(tmp_path / "m", family, **settings)
    loss, gradients, num_saved = step(directory, checkpointed=False)
    same_loss, same_gradients, num_saved_less = step(directory, checkpointed=True)
    assert torch.equal(loss, same_loss)
    assert len(gradients) == 2
    for expected, found in zip(gradients, same_gradients, strict=True):
        assert expected.any()
        assert torch.equal(found, expected)
    assert num_saved_less < 0.7 * num_saved


@pytest.mark.parametrize(
    ("checkpointed", "in_backward", "expected"),
    [(False, False, 2), (True, False, 4), (False, True, 4)],
)
def test_an_action_precedes_each_forward_of_a_layer_with_gradients(
    tiny_llama, checkpointed, in_backward, expected
):
    model = load_base(Base(model=str(tiny_llama)), choose("cpu")).model
    path = "model.layers.0.mlp.down_proj"
    model.set_submodule(path, Shifted(model.get_submodule(path)))
    calls = []
    before_each_layer(model, lambda: calls.append(1), in_backward=in_backward)
    if checkpointed:
        enable_checkpointing(model)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        model(ids, use_cache=False)
    assert calls == []
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == expected  # two layers, each once more in backward


def test_a_layer_below_the_first_trained_one_has_no_backward(tiny_llama):
    model = load_base(Base(model=str(tiny_llama)), choose("cpu")).model
    path = "model.layers.1.mlp.down_proj"
    model.set_submodule(path, Shifted(model.get_submodule(path)))
    calls = []
    before_each_layer(model, lambda: calls.append(1), in_backward=True)
    ids = torch.arange(40)[None]
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 3
