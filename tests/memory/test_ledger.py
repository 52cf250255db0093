"""The predicted terms against the tensors of a real model and the peak of a real step."""

import dataclasses

import pytest
import torch
from live_bytes import LiveBytes

from qlora_lite.adapters.attach import attach
from qlora_lite.adapters.method import lora_footprint
from qlora_lite.adapters.plan import plan_adapter
from qlora_lite.foundation.device import choose
from qlora_lite.kernels.cross_entropy import linear_cross_entropy
from qlora_lite.memory.ledger import RunShape, make_ledger, num_trained
from qlora_lite.memory.terms import Ledger
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.lora_mini import LoRAMini
from qlora_lite.methods.pissa import PiSSA
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.checkpointing import enable_checkpointing
from qlora_lite.model.facts import facts_of
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from qlora_lite.model.shape import ModelShape, model_shape
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.optimizer import AdamW
from tests.tiny import save_tiny, tiny_model

RULE = choose("cpu")
QUANTS = {
    "nf4": {"kind": "nf4"},
    "fp4 without double quantisation": {"kind": "fp4", "double_quant": False},
    "int8": {"kind": "int8"},
    "bf16": {"kind": "bf16"},
    "fp32": {"kind": "fp32"},
}


def run_shape(model: ModelShape, quant: dict, **changed: object) -> RunShape:
    """Rank 8 on all linear layers, on CPU."""
    run = RunShape(
        device="cpu",
        quant=quant["kind"],
        double_quant=quant.get("double_quant", True),
        adapters={p: lora_footprint(m.d_in, m.d_out, 8) for p, m in model.linears.items()},
        rank=8,
        max_tokens=64,
        tokens_per_step=256,
        compute_bytes=4,
        storage_bytes=4 if quant["kind"] == "fp32" else 2,
        norm_bytes=4,
    )
    return dataclasses.replace(run, **changed)


def bytes_of(ledger: Ledger, *starts: str) -> int:
    return sum(t.num_bytes for t in ledger.terms if t.name.startswith(starts))


@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS.keys())
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("qwen3", True), ("gpt2", True), ("mixtral", False)]
)
def test_weight_bytes_are_those_of_a_loaded_model(tmp_path, family, tied, quant):
    directory = save_tiny(tmp_path / "base", family, tied=tied)
    loaded = load_base(Base(model=str(directory), quant=quant), RULE)
    shape = model_shape(loaded.config)
    ledger = make_ledger(shape, run_shape(shape, quant), rows=1)
    parts = list(loaded.model.modules())
    parameters = {id(p): p for p in loaded.model.parameters()}
    scales = sum(
        buffer.nbytes
        for part in parts
        if isinstance(part, FrozenLinear)
        for buffer in (part.scales, part.nested_scales, part.offset)
        if buffer is not None
    )
    assert any(isinstance(part, FrozenEmbedding) for part in parts)
    predicted = bytes_of(ledger, "linear", "embedding", "head", "norms", "experts", "other")
    assert predicted == sum(p.nbytes for p in parameters.values()) + scales


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_bytes_of_a_quantised_head_are_those_of_a_loaded_one(tmp_path, head):
    directory = save_tiny(tmp_path / "base", "llama")
    loaded = load_base(Base(model=str(directory), head=head), RULE)
    shape = model_shape(loaded.config)
    ledger = make_ledger(shape, run_shape(shape, {"kind": "nf4"}, head=head), rows=1)
    assert bytes_of(ledger, "head") == loaded.model.get_output_embeddings().num_bytes


def test_adapter_bytes_are_those_of_attached_ones(tmp_path):
    directory = save_tiny(tmp_path / "base", "llama")
    loaded = load_base(Base(model=str(directory)), RULE)
    shape = model_shape(loaded.config)
    method = method_for(LoRA(rank=4, ranks={"0": 12}, embedding_rank=3, targets="attention"))
    plan = plan_adapter(method, facts_of(loaded.config))
    attached = attach(loaded.model, method, plan, 0, torch.bfloat16)
    adapters = {s.path: method.footprint(s, plan.layers[s.path]) for s in plan.specs}
    run = run_shape(shape, {"kind": "nf4"}, adapters=adapters, embedding_rank=3)
    assert num_trained(shape, run) == attached.num_parameters
    held = sum(p.nbytes for p in attached.parameters().values())
    terms = {term.name: term.num_bytes for term in make_ledger(shape, run, rows=1).terms}
    assert terms["adapters"] == held
    assert terms["adapters: gradients"] == terms["adapters: fp32 master copies"] == 2 * held


@pytest.mark.parametrize("settings", [LoRAMini(rank=4), PiSSA(rank=4)], ids=["lora_mini", "pissa"])
def test_frozen_factor_bytes_are_those_of_attached_ones(tmp_path, settings):
    loaded = load_base(Base(model=str(save_tiny(tmp_path / "base"))), RULE)
    shape, method = model_shape(loaded.config), method_for(settings)
    plan = plan_adapter(method, facts_of(loaded.config))
    attached = attach(loaded.model, method, plan, 0, torch.bfloat16)
    adapters = {spec.path: method.footprint(spec, plan.layers[spec.path]) for spec in plan.specs}
    ledger = make_ledger(shape, run_shape(shape, {"kind": "nf4"}, adapters=adapters), 1)
    held = sum(
        getattr(layer, name).nbytes for layer in attached.layers.values() for name in layer.frozen
    )
    assert held > 0
    assert bytes_of(ledger, "adapters: frozen") == held


FOUR_LAYERS = {"llama": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}}


@pytest.mark.parametrize(("compute", "most"), [("fp32", 1.12), ("bf16", 1.3)])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_predicted_peak_is_little_above_a_real_step(
    tmp_path, family, checkpointing, compute, most
):
    # in bf16, RMSNorms in fp32 make most activations fp32, and the plan counts all as fp32
    rows, tokens, rule = 4, 128, choose("cpu", compute)
    directory = save_tiny(tmp_path / "base", family, **FOUR_LAYERS[family])
    loaded = load_base(Base(model=str(directory)), rule)
    shape = model_shape(loaded.config)
    method = method_for(LoRA(rank=8))
    plan = plan_adapter(method, facts_of(loaded.config))
    attached = attach(loaded.model, method, plan, 0, torch.bfloat16)
    optimizer = AdamW(
        attached.groups(),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        states="32bit",
        rounding="master",
    )
    engine = TorchEngine(optimizer, rule.compute)
    if checkpointing:
        enable_checkpointing(loaded.model)
    model = CausalModel(loaded.model)
    run = run_shape(
        shape,
        {"kind": "nf4"},
        max_tokens=tokens,
        checkpointing=checkpointing,
        compute_bytes=rule.compute.itemsize,
    )
    ledger = make_ledger(shape, run, rows)

    ids = torch.randint(0, shape.vocab, (rows, tokens))
    positions = torch.arange(tokens).remainder(tokens // 2).repeat(rows, 1)
    held = [*loaded.model.parameters(), *loaded.model.buffers(), *optimizer.fp32_copies]
    with LiveBytes([*held, ids, positions]) as live:
        hidden = model.hidden(ids, positions)
        engine.backward(linear_cross_entropy(hidden, ids, model.logits), last=True)
    assert all(fp32_copy.grad is not None for fp32_copy in optimizer.fp32_copies)
    names = ("one dequantised", "adapters: g", "inputs", "activations", "temporary", "batch")
    assert 1.0 <= bytes_of(ledger, *names) / live.peak < most


def test_a_tied_head_is_counted_once():
    shapes = [model_shape(tiny_model("llama", tied=tied).config) for tied in (True, False)]
    once, twice = (make_ledger(shape, run_shape(shape, {"kind": "nf4"}), 1) for shape in shapes)
    assert bytes_of(twice, "embedding") == bytes_of(once, "embedding") == bytes_of(twice, "head")
    assert bytes_of(once, "head") == 0


def test_on_cuda_what_pytorch_does_not_count_is_a_separate_term():
    shape = model_shape(tiny_model("llama").config)
    run = run_shape(shape, {"kind": "nf4"}, device="cuda", compute_bytes=2, norm_bytes=2)
    ledger = make_ledger(shape, run, 1)
    assert ledger.peak_bytes - ledger.measured_bytes == bytes_of(ledger, "CUDA context")
    assert ledger.host_bytes == bytes_of(ledger, "process")


def test_8_bit_states_and_stochastic_rounding_save_what_they_replace():
    shape = model_shape(tiny_model("llama").config)
    num = num_trained(shape, run_shape(shape, {"kind": "nf4"}))
    full = make_ledger(shape, run_shape(shape, {"kind": "nf4"}), 1)
    lean = run_shape(shape, {"kind": "nf4"}, states="8bit", rounding="stochastic")
    saved = {t.name: t.num_bytes for t in full.terms}
    for term in make_ledger(shape, lean, 1).terms:
        saved[term.name] = saved.get(term.name, 0) - term.num_bytes
    del saved["margin"]  # a share of all the others
    assert saved["adapters: fp32 master copies"] == 4 * num
    assert saved["Adam's moments"] == pytest.approx(6 * num, rel=0.01)
    assert (
        sum(map(abs, saved.values()))
        == saved["adapters: fp32 master copies"] + saved["Adam's moments"]
    )
