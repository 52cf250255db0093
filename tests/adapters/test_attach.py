"""Attaching: which layers, at which rank, with which parameters, and turning them off again."""

import pytest
import torch

from qlora_lite.adapters.attach import attach
from qlora_lite.adapters.plan import plan_adapter
from qlora_lite.foundation import device
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.lora import LoRA, LoRALayer
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from tests.tiny import save_tiny

IDS = torch.arange(5, 45).view(2, 20)
POSITIONS = torch.arange(20).expand(2, 20)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / request.param, request.param)


def attached_to(directory, **settings):
    settings_of_base = Base(model=str(directory))
    facts = read_facts(settings_of_base)
    base = load_base(settings_of_base, device.choose("cpu"), facts=facts)
    model = CausalModel(base.model)
    base_logits = logits(model)
    method = method_for(LoRA(**settings))
    attached = attach(base.model, method, plan_adapter(method, facts), 0, torch.bfloat16)
    return model, attached, base_logits


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(IDS, POSITIONS))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_norms": True, "embedding_rank": 3},
        {"train_modules": ["lm_head"]},
        {"train_modules": ["*.0.*"], "targets": ["*.1.*"]},  # GPT-2's have biases
        {"dtype": "fp32", "ranks": {"0": 2, "1": 0}},
    ],
    ids=str,
)
def test_the_adapted_model_starts_as_the_base_bit_for_bit(directory, settings):
    model, attached, base_logits = attached_to(directory, **settings)
    attached.train()
    assert torch.equal(logits(model), base_logits)


def test_disabled_it_is_the_base_whatever_was_trained(directory):
    model, attached, base_logits = attached_to(
        directory,
        train_norms=True,
        embedding_rank=3,
        train_modules=["lm_head", "*.0.*.c_fc"][: _num(directory)],
    )
    train_everything(attached)
    adapted = logits(model)
    assert not torch.equal(adapted, base_logits)
    with attached.disabled():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize(
    "settings",
    [{"train_norms": True}, {"train_modules": ["*.1.*"]}, {"embedding_rank": 3}, {}],
    ids=["norms", "full modules", "embedding", "adapters"],
)
def test_after_an_error_inside_disabled_everything_trained_is_in_use_again(directory, settings):
    """Each kind alone, so that one that stays switched off is not hidden by the others."""
    targets = ["*.0.*"]  # of the first block; the second may be fully trained
    model, attached, base_logits = attached_to(directory, targets=targets, **settings)
    train_everything(attached)
    adapted, modules = logits(model), dict(model.module.named_modules())
    with pytest.raises(KeyboardInterrupt), attached.disabled():
        assert torch.equal(logits(model), base_logits)
        raise KeyboardInterrupt
    assert torch.equal(logits(model), adapted)
    after = dict(model.module.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is module for path, module in modules.items())


def train_everything(attached):
    """Move every trained parameter."""
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(0.1)


def _num(directory):
    """Only GPT-2 has linear layers with a bias, of which one is fully trained too."""
    return 2 if directory.name == "gpt2" else 1


def test_only_the_adapter_is_trained_and_every_parameter_is_in_one_group(directory):
    model, attached, _ = attached_to(directory, train_norms=True, embedding_rank=2)
    trained = {id(p) for p in model.module.parameters() if p.requires_grad}
    assert trained == {id(p) for p in attached.parameters().values()}
    grouped = [id(p) for group in attached.groups() for p in group.parameters]
    assert sorted(grouped) == sorted(trained)
    assert attached.num_parameters == sum(p.numel() for p in attached.parameters().values())


def test_the_learning_rate_ratio_reaches_the_up_factors_alone(directory):
    _, attached, _ = attached_to(directory, lr_ratio=16)
    factors = {g.lr_factor: g.names for g in attached.groups()}
    assert {name.rpartition(".")[2] for name in factors[16]} == {"b"}
    assert {name.rpartition(".")[2] for name in factors[1]} == {"a"}


def test_the_initialisation_of_a_layer_depends_only_on_its_path(directory):
    _, everything, _ = attached_to(directory)
    _, some, _ = attached_to(directory, targets="mlp")
    assert set(some.layers) < set(everything.layers)
    for path, layer in some.layers.items():
        assert torch.equal(layer.a, everything.layers[path].a)


def test_parameters_have_the_ranks_of_the_recipe(tmp_path):
    _, attached, _ = attached_to(
        save_tiny(tmp_path / "llama", "llama"),
        targets=["q_proj", "*.mlp.down_proj"],
        rank=4,
        ranks={"1": 8, "down_proj": 2},
    )
    shapes = {name: tuple(p.shape) for name, p in attached.parameters().items()}
    assert shapes == {
        "model.layers.0.self_attn.q_proj.a": (4, 64),
        "model.layers.0.self_attn.q_proj.b": (64, 4),
        "model.layers.0.mlp.down_proj.a": (2, 128),
        "model.layers.0.mlp.down_proj.b": (64, 2),
        "model.layers.1.self_attn.q_proj.a": (8, 64),
        "model.layers.1.self_attn.q_proj.b": (64, 8),
        "model.layers.1.mlp.down_proj.a": (2, 128),
        "model.layers.1.mlp.down_proj.b": (64, 2),
    }
    assert all(isinstance(layer, LoRALayer) for layer in attached.layers.values())
    assert {p.dtype for p in attached.parameters().values()} == {torch.bfloat16}
