"""Will it fit, how much at a time, and if not, what helps.

    plan = make_plan(model_shape(config), run, budget_bytes)

A function of shapes to a value: nothing is downloaded, built or run.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.units import format_bytes
from qlora_lite.memory import formulas
from qlora_lite.memory.ledger import Ledger, RunShape, make_ledger, num_trained
from qlora_lite.model.shape import ModelShape

CPU_MICRO_BATCH_TOKENS = 2048
"""On CPU more tokens at a time save nothing but dequantisation, a few percent of a step by then."""


@dataclass(frozen=True)
class MemorySaving:
    """A setting that needs less."""

    setting: str
    """As it is written on the command line."""
    saved_bytes: int
    """Of the peak, taken alone."""


@dataclass(frozen=True)
class Plan:
    """What a run will need, against what it may use."""

    ledger: Ledger
    budget_bytes: int
    micro_batch_tokens: int
    """What one forward sees: whole rows, as many as fit."""
    num_parameters: int
    num_trained: int
    flops_per_token: float
    savings: tuple[MemorySaving, ...]
    """Mildest first; none where it fits."""
    sufficient_settings: tuple[str, ...]
    """Settings that together make it fit, none of them needlessly; none where nothing helps."""

    @property
    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes

    @property
    def spare_bytes(self) -> int:
        """What the budget leaves; negative where it does not fit."""
        return self.budget_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def verdict(self) -> str:
        """One sentence."""
        need = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"
        if self.fits:
            return f"fits: {need}, {format_bytes(self.spare_bytes)} to spare"
        return f"does not fit: {need}, {format_bytes(-self.spare_bytes)} too much"

    def rows(self) -> list[tuple[str, int, str]]:
        """Name, bytes and formula of every term on the device, for a table."""
        return [(t.name, t.num_bytes, t.formula) for t in self.ledger.terms if t.place == "device"]


def make_plan(model: ModelShape, run: RunShape, budget_bytes: int) -> Plan:
    """The largest micro-batch that the budget allows, and what it takes.

    Where not even one row fits, the plan is for one row, with the ways down.
    """
    rows = _choose_rows(model, run, budget_bytes)
    ledger = make_ledger(model, run, rows)
    fits = ledger.peak_bytes <= budget_bytes
    return Plan(
        ledger=ledger,
        budget_bytes=budget_bytes,
        micro_batch_tokens=rows * run.max_tokens,
        num_parameters=model.num_parameters,
        num_trained=num_trained(model, run),
        flops_per_token=_flops_per_token(model, run),
        savings=() if fits else _ways_down(model, run, ledger.peak_bytes),
        sufficient_settings=() if fits else _sufficient_settings(model, run, budget_bytes),
    )


def require_fit(plan: Plan) -> None:
    """Stop before the long download.

    Raises:
        BudgetError: if the plan does not fit; with the cheapest ways down and what each saves.
    """
    if plan.fits:
        return
    ways = ", ".join(f"{w.setting} (-{format_bytes(w.saved_bytes)})" for w in plan.savings)
    together = " ".join(plan.sufficient_settings)
    help_text = f"These together fit: {together}" if together else "Even all of them do not fit"
    help_text += ". Otherwise take a larger budget=..."
    raise BudgetError(
        f"{format_bytes(plan.peak_bytes)} needed, {format_bytes(plan.budget_bytes)} allowed. "
        f"Cheapest ways down: {ways or 'none'}. {help_text}"
    )


def _choose_rows(model: ModelShape, run: RunShape, budget_bytes: int) -> int:
    """Rows of a micro-batch: what was asked for, or as many as fit and a step needs."""
    if run.micro_batch_tokens is not None:
        return max(run.micro_batch_tokens // run.max_tokens, 1)
    most = run.tokens_per_step
    if run.device == "cpu":
        most = min(most, CPU_MICRO_BATCH_TOKENS)
    candidates = range(1, max(most // run.max_tokens, 1) + 1)
    fitting = bisect_right(
        candidates, budget_bytes, key=lambda rows: make_ledger(model, run, rows).peak_bytes
    )
    return max(fitting, 1)


def _flops_per_token(model: ModelShape, run: RunShape) -> float:
    return formulas.flops_per_token(
        sum(p.num_weights for p in model.linears.values()),
        num_trained(model, run),
        model.vocab,
        model.hidden,
        model.layers,
        model.heads * model.head_dim,
        run.max_tokens,
        run.checkpointing,
        run.has_teacher,
    )


@dataclass(frozen=True)
class _Change:
    """A setting and what it does to a run's shape."""

    field: str
    value: str
    run: Callable[[RunShape], RunShape]


def _ways_down(model: ModelShape, run: RunShape, peak_bytes: int) -> tuple[MemorySaving, ...]:
    """Every setting that saves something, taken alone, at its first value."""
    ways: dict[str, MemorySaving] = {}
    for change in _changes(run):
        saved = peak_bytes - _smallest_peak(model, change.run(run))
        if saved > 0:
            ways.setdefault(change.field, MemorySaving(f"{change.field}={change.value}", saved))
    return tuple(ways.values())


def _sufficient_settings(model: ModelShape, run: RunShape, budget_bytes: int) -> tuple[str, ...]:
    """As many settings, mildest first, as it takes to fit, and none that could be left out."""
    taken: dict[str, _Change] = {}
    for change in _changes(run):
        taken[change.field] = change
        if _peak_with(model, run, taken) <= budget_bytes:
            break
    else:
        return ()
    for field in reversed(list(taken)):
        others = {name: change for name, change in taken.items() if name != field}
        if _peak_with(model, run, others) <= budget_bytes:
            taken = others
    return tuple(f"{change.field}={change.value}" for change in taken.values())


def _peak_with(model: ModelShape, run: RunShape, changes: Mapping[str, "_Change"]) -> int:
    for change in changes.values():
        run = change.run(run)
    return _smallest_peak(model, run)


def _smallest_peak(model: ModelShape, run: RunShape) -> int:
    """With the micro-batch that was asked for, or one row."""
    rows = max((run.micro_batch_tokens or 1) // run.max_tokens, 1)
    return make_ledger(model, run, rows).peak_bytes


def _changes(run: RunShape) -> Iterator[_Change]:
    """Settings that need less, from those that change no result to those that change most."""
    if (run.micro_batch_tokens or 0) >= 2 * run.max_tokens:
        yield _change("optim.micro_batch_tokens", run.max_tokens, micro_batch_tokens=run.max_tokens)
    if not run.checkpointing:
        yield _change("optim.checkpointing", "true", checkpointing=True)
    if run.device == "cuda" and run.states == "32bit":
        yield _change("optim.states", "8bit", states="8bit")
    four_bit = run.quant in ("nf4", "fp4")
    if four_bit and not run.double_quant:
        yield _change("base.quant.double_quant", "true", double_quant=True)
    if not four_bit:
        yield _change("base.quant", "nf4", quant="nf4", double_quant=True, block_size=64)
    if run.rank > 1:
        rank = run.rank // 2
        smaller = {path: f.scaled(rank / run.rank) for path, f in run.adapters.items()}
        yield _change("adapter.rank", rank, adapters=smaller, rank=rank)
    if run.head != "nf4":
        yield _change("base.head", "nf4", head="nf4")
    max_tokens = run.max_tokens // 2
    while max_tokens >= 256:
        yield _change("data.max_tokens", max_tokens, max_tokens=max_tokens)
        max_tokens //= 2


def _change(field: str, value: object, **changed: Any) -> _Change:
    return _Change(field, str(value), lambda run: replace(run, **changed))
