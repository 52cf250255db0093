"""Will a run fit, how many rows at a time, and if it does not fit, what would help.

    plan = make_plan(facts.shape, run, budget_bytes, alternatives)

A pure function of shapes: nothing is downloaded, built or run. The caller says which settings may
change (`alternatives`), because only it knows how a recipe spells them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.units import format_bytes
from qlora_lite.memory import formulas
from qlora_lite.memory.ledger import Ledger, RunShape, make_ledger, num_trained
from qlora_lite.model.shape import ModelShape

CPU_MICRO_BATCH_TOKENS = 2048
"""On CPU more tokens at a time save nothing but dequantisation, a few percent of a step by then."""


@dataclass(frozen=True)
class Alternative:
    """Another value of a setting, and what it does to a run's shape."""

    field: str
    """Path of the setting in the recipe."""
    value: str
    """As it is written on the command line."""
    apply: Callable[[RunShape], RunShape]

    @property
    def setting(self) -> str:
        return f"{self.field}={self.value}"


Alternatives = Callable[[RunShape], Iterable[Alternative]]
"""The settings that need less memory, mildest first."""


@dataclass(frozen=True)
class MemorySaving:
    """What one setting would save."""

    setting: str
    """As it is written on the command line."""
    saved_bytes: int
    """Of the peak, if only this setting changes."""


@dataclass(frozen=True)
class Plan:
    """The memory that a run needs, and the budget that it has."""

    ledger: Ledger
    budget_bytes: int
    micro_batch_tokens: int
    """Tokens of one forward: as many full rows as fit."""
    num_parameters: int
    num_trained: int
    flops_per_token: float
    savings: tuple[MemorySaving, ...]
    """Mildest first; empty if the run fits."""
    sufficient_settings: tuple[str, ...]
    """Settings that together make it fit; empty if it fits, or if nothing helps."""

    @property
    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes

    @property
    def spare_bytes(self) -> int:
        """What is left of the budget; negative if the run does not fit."""
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


def make_plan(
    model: ModelShape, run: RunShape, budget_bytes: int, alternatives: Alternatives
) -> Plan:
    """The largest micro-batch that fits into the budget, and the memory that it needs.

    If not even one row fits, the plan is for one row, and lists what would save memory.
    """
    rows = _choose_rows(model, run, budget_bytes)
    ledger = make_ledger(model, run, rows)
    fits = ledger.peak_bytes <= budget_bytes
    others = () if fits else tuple(alternatives(run))
    return Plan(
        ledger=ledger,
        budget_bytes=budget_bytes,
        micro_batch_tokens=rows * run.max_tokens,
        num_parameters=model.num_parameters,
        num_trained=num_trained(model, run),
        flops_per_token=_flops_per_token(model, run),
        savings=_savings(model, run, others, ledger.peak_bytes),
        sufficient_settings=_sufficient_settings(model, run, others, budget_bytes),
    )


def require_fit(plan: Plan) -> None:
    """Stop a run that does not fit before the base is downloaded.

    Raises:
        BudgetError: if the plan does not fit; says what each change of a setting would save.
    """
    if plan.fits:
        return
    savings = ", ".join(f"{w.setting} (-{format_bytes(w.saved_bytes)})" for w in plan.savings)
    together = " ".join(plan.sufficient_settings)
    help_text = f"These together fit: {together}" if together else "All of them together do not fit"
    help_text += ". Otherwise raise the budget"
    raise BudgetError(
        f"{format_bytes(plan.peak_bytes)} needed, {format_bytes(plan.budget_bytes)} allowed. "
        f"Mildest savings: {savings or 'none'}. {help_text}"
    )


def _choose_rows(model: ModelShape, run: RunShape, budget_bytes: int) -> int:
    """Rows of a micro-batch: as set, else as many as fit and a step needs."""
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


def _savings(
    model: ModelShape, run: RunShape, alternatives: Iterable[Alternative], peak_bytes: int
) -> tuple[MemorySaving, ...]:
    """What each setting saves when only it is changed, to the first value that saves something."""
    savings: dict[str, MemorySaving] = {}
    for other in alternatives:
        saved = peak_bytes - _smallest_peak(model, other.apply(run))
        if saved > 0:
            savings.setdefault(other.field, MemorySaving(other.setting, saved))
    return tuple(savings.values())


def _sufficient_settings(
    model: ModelShape, run: RunShape, alternatives: Iterable[Alternative], budget_bytes: int
) -> tuple[str, ...]:
    """The mildest settings that together make the run fit; none of them is superfluous."""
    chosen: dict[str, Alternative] = {}
    for other in alternatives:
        chosen[other.field] = other
        if _peak_with(model, run, chosen) <= budget_bytes:
            break
    else:
        return ()
    for field in reversed(list(chosen)):
        rest = {name: other for name, other in chosen.items() if name != field}
        if _peak_with(model, run, rest) <= budget_bytes:
            chosen = rest
    return tuple(other.setting for other in chosen.values())


def _peak_with(model: ModelShape, run: RunShape, chosen: Mapping[str, Alternative]) -> int:
    for other in chosen.values():
        run = other.apply(run)
    return _smallest_peak(model, run)


def _smallest_peak(model: ModelShape, run: RunShape) -> int:
    """With the given micro-batch, or with one row."""
    rows = max((run.micro_batch_tokens or 1) // run.max_tokens, 1)
    return make_ledger(model, run, rows).peak_bytes
