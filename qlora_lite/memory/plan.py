"""Does a run fit into memory, with how many rows per micro-batch, and if not, what would help.

    plan = make_plan(facts.shape, run, budget_bytes, alternatives)

A pure function of shapes: nothing is downloaded, built or run. The caller passes the settings that
may change (`alternatives`), because this module does not know recipes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.units import format_bytes
from qlora_lite.memory import formulas
from qlora_lite.memory.ledger import RunShape, make_ledger, num_trained
from qlora_lite.memory.terms import Ledger, Term
from qlora_lite.model.shape import ModelShape

CPU_MICRO_BATCH_TOKENS = 2048
"""On CPU, larger micro-batches would only save dequantisation: a few percent of a step."""


@dataclass(frozen=True)
class Alternative:
    """Another value of a setting, and how it changes a run's shape."""

    field: str
    """Path of the setting in the recipe."""
    value: str
    """As on the command line."""
    apply: Callable[[RunShape], RunShape]

    @property
    def setting(self) -> str:
        return f"{self.field}={self.value}"


Alternatives = Callable[[RunShape], Iterable[Alternative]]
"""Settings that need less memory, smallest effect on the result first."""


@dataclass(frozen=True)
class MemorySaving:
    """What one setting would save."""

    setting: str
    """As on the command line."""
    saved_bytes: int
    """How much lower the peak is if only this setting changes."""


@dataclass(frozen=True)
class Plan:
    """The memory that a run needs, and its budget."""

    ledger: Ledger
    budget_bytes: int
    micro_batch_tokens: int
    """Tokens per forward: as many full rows as fit."""
    num_parameters: int
    num_trained: int
    flops_per_token: float
    savings: tuple[MemorySaving, ...]
    """Smallest effect on the result first; empty if the run fits."""
    sufficient_settings: tuple[str, ...]
    """Settings that together make it fit; empty if it fits, or if even all of them do not help."""

    @property
    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes

    @property
    def spare_bytes(self) -> int:
        """Budget minus peak; negative if the run does not fit."""
        return self.budget_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def verdict(self) -> str:
        """Whether it fits, in one sentence."""
        need = f"needs {format_bytes(self.peak_bytes)}, has {format_bytes(self.budget_bytes)}"
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


def with_rows(plan: Plan, num_tokens: int, num_rows: int, *, packing: bool, is_cpu: bool) -> Plan:
    """The plan of a run whose rows are read: their memory is known only then.

    Args:
        is_cpu: the run computes where its rows are; otherwise they are in host memory.
    """
    term = Term(
        "rows",
        formulas.rows_bytes(num_tokens, num_rows, packing=packing),
        f"{num_tokens:,} tokens x 5 B, {num_rows:,} rows",
        "device" if is_cpu else "host",
    )
    return replace(plan, ledger=Ledger((*plan.ledger.terms, term)))


def require_fit(plan: Plan) -> None:
    """Raise if the run does not fit, before the base is downloaded.

    Raises:
        BudgetError: naming what each change of a setting would save.
    """
    if plan.fits:
        return
    savings = ", ".join(f"{s.setting} (-{format_bytes(s.saved_bytes)})" for s in plan.savings)
    together = " ".join(plan.sufficient_settings)
    help_text = f"It fits with {together}" if together else "Even all of them together do not fit"
    help_text += ". Otherwise raise the budget"
    raise BudgetError(
        f"{format_bytes(plan.peak_bytes)} needed, {format_bytes(plan.budget_bytes)} allowed. "
        f"Settings that save memory: {savings or 'none'}. {help_text}"
    )


def _choose_rows(model: ModelShape, run: RunShape, budget_bytes: int) -> int:
    """Rows of a micro-batch: as set, else as many as fit, at most a process's share of a step."""
    max_tokens = run.tokens_per_step // run.processes
    if run.micro_batch_tokens is not None:
        if run.processes > 1:
            max_tokens = min(max_tokens, run.micro_batch_tokens)
        else:
            max_tokens = run.micro_batch_tokens
        return max(max_tokens // run.max_tokens, 1)
    if run.device == "cpu":
        max_tokens = min(max_tokens, CPU_MICRO_BATCH_TOKENS)
    candidates = range(1, max(max_tokens // run.max_tokens, 1) + 1)
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
    """What each setting saves if only it is changed, to the first value that saves anything."""
    savings: dict[str, MemorySaving] = {}
    for other in alternatives:
        saved = peak_bytes - _smallest_peak(model, other.apply(run))
        if saved > 0:
            savings.setdefault(other.field, MemorySaving(other.setting, saved))
    return tuple(savings.values())


def _sufficient_settings(
    model: ModelShape, run: RunShape, alternatives: Iterable[Alternative], budget_bytes: int
) -> tuple[str, ...]:
    """The settings with the smallest effect that together make the run fit, and no more of them."""
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
    """The peak with the given micro-batch, or with one row."""
    rows = max((run.micro_batch_tokens or 1) // run.max_tokens, 1)
    return make_ledger(model, run, rows).peak_bytes
