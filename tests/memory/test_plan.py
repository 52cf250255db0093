"""The plan keeps the budget, and the settings that it suggests really help."""

import dataclasses

import pytest

from qlora_lite.adapters.method import lora_footprint
from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.memory.known import known_config
from qlora_lite.memory.ledger import RunShape, make_ledger
from qlora_lite.memory.plan import make_plan, require_fit
from qlora_lite.model.config import read_config
from qlora_lite.model.shape import model_shape
from qlora_lite.run.savings import alternatives

LLAMA_8B = model_shape(
    read_config(
        "meta-llama/Llama-3.1-8B",
        known=known_config("meta-llama/Llama-3.1-8B"),
    )
)
ON_CARD = RunShape(
    device="cuda",
    quant="nf4",
    adapters={p: lora_footprint(m.d_in, m.d_out, 16) for p, m in LLAMA_8B.linears.items()},
    rank=16,
    max_tokens=2048,
    tokens_per_step=32_768,
    states="8bit",
)
WASTEFUL = dataclasses.replace(
    ON_CARD, quant="int8", states="32bit", checkpointing=False, max_tokens=4096
)


def plan_for(run: RunShape, budget: str):
    return make_plan(LLAMA_8B, run, parse_bytes(budget), alternatives)


def test_an_8b_model_needs_about_what_a_hand_computed_table_has():
    # 8.2 GB: one row of 2048 tokens, 8-bit Adam, without masters, masks and fp32 copies in norms
    one_row = dataclasses.replace(ON_CARD, micro_batch_tokens=2048, attention="flash_attention_2")
    assert plan_for(one_row, "22GiB").peak_bytes == pytest.approx(8.2e9, rel=0.1)


@pytest.mark.parametrize("budget", ["9GiB", "12GiB", "16GiB", "22GiB"])
def test_the_micro_batch_is_the_largest_that_fits(budget):
    plan = plan_for(ON_CARD, budget)
    rows = plan.micro_batch_tokens // 2048
    assert plan.fits
    assert plan.micro_batch_tokens == rows * 2048
    assert make_ledger(LLAMA_8B, ON_CARD, rows).peak_bytes == plan.peak_bytes
    assert make_ledger(LLAMA_8B, ON_CARD, rows + 1).peak_bytes > plan.budget_bytes


def test_the_micro_batch_is_never_more_than_a_step():
    assert plan_for(ON_CARD, "200GiB").micro_batch_tokens == 32_768
    small = dataclasses.replace(ON_CARD, tokens_per_step=100)
    assert plan_for(small, "200GiB").micro_batch_tokens == 2048


def test_the_micro_batch_is_limited_on_cpu():
    on_cpu = dataclasses.replace(
        ON_CARD, device="cpu", compute_bytes=4, norm_bytes=4, states="32bit", max_tokens=512
    )
    assert plan_for(on_cpu, "200GiB").micro_batch_tokens == 2048


def test_a_given_micro_batch_is_used():
    given = dataclasses.replace(ON_CARD, micro_batch_tokens=5000)
    assert plan_for(given, "200GiB").micro_batch_tokens == 4096


def test_a_run_that_fits_gets_no_suggestions():
    plan = plan_for(ON_CARD, "22GiB")
    assert (plan.savings, plan.sufficient_settings) == ((), ())
    assert plan.verdict.startswith("fits")
    require_fit(plan)


def test_a_run_that_does_not_fit_is_refused_with_the_savings():
    plan = plan_for(WASTEFUL, "10GiB")
    assert not plan.fits
    assert plan.spare_bytes == plan.budget_bytes - plan.peak_bytes < 0
    assert [saving.setting for saving in plan.savings] == [
        "optim.checkpointing=true",
        "optim.states=8bit",
        "base.quant=nf4",
        "adapter.rank=8",
        "base.head=nf4",
        "data.max_tokens=2048",
    ]
    with pytest.raises(BudgetError, match=r"needed, 10.0 GiB allowed.*base.quant=nf4 \(-3"):
        require_fit(plan)


def test_each_saving_is_what_the_setting_saves():
    savings = {s.setting: s.saved_bytes for s in plan_for(WASTEFUL, "10GiB").savings}
    unchanged = make_ledger(LLAMA_8B, WASTEFUL, 1).peak_bytes
    changed = {
        "optim.checkpointing=true": {"checkpointing": True},
        "optim.states=8bit": {"states": "8bit"},
        "base.quant=nf4": {"quant": "nf4"},
        "base.head=nf4": {"head": "nf4"},
        "data.max_tokens=2048": {"max_tokens": 2048},
    }
    for setting, fields in changed.items():
        smaller = dataclasses.replace(WASTEFUL, **fields)
        assert savings[setting] == unchanged - make_ledger(LLAMA_8B, smaller, 1).peak_bytes


def test_the_sufficient_settings_fit_together():
    plan = plan_for(WASTEFUL, "10GiB")
    assert plan.sufficient_settings == ("optim.checkpointing=true", "base.quant=nf4")
    smaller = dataclasses.replace(WASTEFUL, checkpointing=True, quant="nf4")
    assert plan_for(smaller, "10GiB").fits
    for needed in ({"quant": "int8"}, {"checkpointing": False}):
        assert not plan_for(dataclasses.replace(smaller, **needed), "10GiB").fits


def test_no_setting_is_changed_without_need():
    """A smaller rank affects the result less, but is not enough; shorter rows alone are."""
    on_cpu = dataclasses.replace(
        ON_CARD, device="cpu", compute_bytes=4, states="32bit", head="nf4", max_tokens=4096
    )
    needed = make_ledger(LLAMA_8B, on_cpu, 1).peak_bytes
    shorter = make_ledger(LLAMA_8B, dataclasses.replace(on_cpu, max_tokens=2048), 1).peak_bytes
    ranks = {p: f.scaled(0.5) for p, f in on_cpu.adapters.items()}
    smaller = dataclasses.replace(on_cpu, adapters=ranks, rank=8)
    assert shorter < make_ledger(LLAMA_8B, smaller, 1).peak_bytes < needed
    plan = make_plan(LLAMA_8B, on_cpu, shorter, alternatives)
    assert plan.sufficient_settings == ("data.max_tokens=2048",)


def test_if_nothing_is_enough_the_error_says_so():
    plan = plan_for(WASTEFUL, "1GiB")
    assert plan.sufficient_settings == ()
    with pytest.raises(BudgetError, match="Even all of them together do not fit"):
        require_fit(plan)


def test_the_listed_terms_add_up_to_the_peak():
    plan = plan_for(ON_CARD, "22GiB")
    assert sum(num_bytes for _, num_bytes, _ in plan.rows()) == plan.peak_bytes
