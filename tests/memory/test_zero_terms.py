"""What each ZeRO stage divides, by hand for a layer of a few numbers."""

import dataclasses

import pytest

from qlora_lite.adapters.method import lora_footprint
from qlora_lite.memory.ledger import RunShape, make_ledger, num_trained
from qlora_lite.memory.terms import Ledger, Term
from qlora_lite.memory.zero_terms import ZeroShape, divide
from qlora_lite.model.shape import ModelShape, model_shape
from tests.tiny import tiny_model

BASE = Term("codes", 1000 + 31, "1031 B", part="parameters", whole_bytes=31)
GRADIENTS = Term("gradients", 400, "400 B", part="gradients")
STATES = Term("states", 1601, "1601 B", part="states")
ACTIVATIONS = Term("activations", 777, "777 B")
TERMS = [BASE, GRADIENTS, STATES, ACTIVATIONS]


def divided(zero: ZeroShape, processes: int, device: str = "cuda") -> dict[str, tuple[int, str]]:
    return {t.name: (t.num_bytes, t.place) for t in divide(TERMS, zero, processes, device)}


@pytest.mark.parametrize(
    ("stage", "base", "gradients"), [(1, 1031, 400), (2, 1031, 100), (3, 250, 100)]
)
def test_a_quarter_of_what_the_stage_divides_is_in_each_of_four_processes(stage, base, gradients):
    scales = {"codes: scales": (31, "device")} if stage == 3 else {}
    assert divided(ZeroShape(stage), 4) == scales | {
        "codes": (base, "device"),
        "gradients": (gradients, "device"),
        "states": (401, "device"),  # 1601 / 4 = 400.25: shares are padded
        "activations": (777, "device"),
    }


def test_shares_are_kept_where_the_settings_say():
    host = divided(ZeroShape(3, optimizer="cpu", parameters="cpu"), 2)
    assert host == {
        "codes": (500, "host"),
        "codes: scales": (31, "device"),
        "gradients": (200, "host"),
        "states": (801, "host"),
        "activations": (777, "device"),
    }
    disk = divided(ZeroShape(3, optimizer="nvme", parameters="nvme"), 2)
    assert {disk["codes"][1], disk["states"][1]} == {"disk"}
    assert disk["gradients"][1] == "host"


def test_on_cpu_host_memory_is_that_of_the_device_and_a_disk_is_not():
    places = divided(ZeroShape(3, optimizer="cpu", parameters="nvme"), 2, device="cpu")
    assert places["states"] == (801, "device")
    assert places["codes"] == (500, "disk")


SHAPE = model_shape(tiny_model("llama", tied=False).config)


def run_shape(shape: ModelShape, **changed: object) -> RunShape:
    run = RunShape(
        device="cpu",
        quant="nf4",
        adapters={p: lora_footprint(m.d_in, m.d_out, 8) for p, m in shape.linears.items()},
        rank=8,
        max_tokens=64,
        tokens_per_step=256,
        adapter_bytes=4,
    )
    return dataclasses.replace(run, **changed)


def ledger_of(stage: int, processes: int, **changed: object) -> Ledger:
    zero = ZeroShape(stage, bucket_numbers=10, **changed)
    return make_ledger(SHAPE, run_shape(SHAPE, zero=zero, processes=processes), rows=1)


def by_name(ledger: Ledger) -> dict[str, int]:
    return {term.name: term.num_bytes for term in ledger.terms}


def test_trained_parameters_are_whole_and_their_states_divided():
    num = num_trained(SHAPE, run_shape(SHAPE))
    for stage in (1, 2, 3):
        terms = by_name(ledger_of(stage, 4))
        assert terms["adapters"] == 4 * num
        assert terms["fp32 master copies"] == num  # 4 bytes in 4 processes
        assert terms["optimizer states"] == 4 * num
        assert terms["adapters: gradients"] == (4 * num if stage == 1 else num)
        assert terms["communication buckets"] == 40


def test_stage_3_gathers_the_largest_weights_unless_a_process_has_all_of_them():
    embedding = 2 * SHAPE.vocab * SHAPE.hidden
    layer = sum(p.num_weights for p in SHAPE.linears.values() if p.block == 0) // 2
    assert by_name(ledger_of(3, 2))["gathered weights"] == max(embedding, layer)
    assert "gathered weights" not in by_name(ledger_of(3, 1))
    assert "gathered weights" not in by_name(ledger_of(2, 2))
    kept = by_name(ledger_of(3, 2, live_numbers=100))["gathered weights"]
    assert kept == max(embedding, layer) + 100


def test_one_process_with_stage_3_on_its_device_has_the_whole_base():
    plain = make_ledger(SHAPE, run_shape(SHAPE), rows=1)
    names = ("linear", "embedding", "head", "norms")
    bases = [
        sum(t.num_bytes for t in ledger.terms if t.name.startswith(names))
        for ledger in (plain, ledger_of(3, 1))
    ]
    assert bases[0] == bases[1]


def test_a_sum_over_processes_needs_two_more_copies_of_the_gradients_for_a_moment():
    long = {"max_tokens": 1, "checkpointing": True}
    alone, two = (
        by_name(make_ledger(SHAPE, run_shape(SHAPE, processes=n, **long), rows=1)) for n in (1, 2)
    )
    assert "temporary: optimizer step" not in alone
    assert 0 < two["temporary: optimizer step"] <= 8 * num_trained(SHAPE, run_shape(SHAPE))
