"""The claims of the papers as tests on the results.

A claim is a function of the readings and a data set. If its runs are missing it raises `Missing`
and is left out. If they must not be compared (comparable.py), it has its measurements and no
verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from method_study.comparable import obstacle
from method_study.contenders import RANK, at_rank
from method_study.readings import Missing, Readings, mean
from method_study.verdict import (
    MIN_DIFFERENCE,
    Finding,
    differences,
    is_above,
    is_not_below,
    mean_and_spread,
)

Claim = Callable[[Readings, str], Finding]
Measure = Callable[[Readings, str, str], Sequence[float]]

TIMES = 4.0
"""Lower end of the claimed speed-up of one DyLoRA run over LoRA runs at every rank."""

SIZES = {"trained": "trained parameters", "components": "remaining components"}


def lower(
    claim: str, method: str, than: str, measure: Measure = Readings.losses, size: str = ""
) -> Claim:
    """The loss of a method is below that of another."""

    def check(readings: Readings, data: str) -> Finding:
        gap = differences(measure(readings, than, data), measure(readings, method, data))
        measured = _compared(readings, data, method, than, measure, size)
        verdict = is_above(gap, MIN_DIFFERENCE)
        return _judged(readings, Finding(claim, data, measured, verdict), (method, than))

    return check


def no_higher(
    claim: str, method: str, than: str, measure: Measure = Readings.losses, size: str = ""
) -> Claim:
    """The loss of a method is not above that of another."""

    def check(readings: Readings, data: str) -> Finding:
        gap = differences(measure(readings, than, data), measure(readings, method, data))
        measured = _compared(readings, data, method, than, measure, size)
        return _judged(readings, Finding(claim, data, measured, is_not_below(gap)), (method, than))

    return check


def _judged(readings: Readings, finding: Finding, methods: Sequence[str]) -> Finding:
    """The finding, without its verdict if the runs of these methods must not be compared."""
    reason = obstacle(readings, finding.data, methods)
    return replace(finding, verdict="no verdict", reason=reason) if reason else finding


def _compared(
    readings: Readings, data: str, method: str, than: str, measure: Measure, size: str
) -> str:
    """Both losses, their difference, and optionally the sizes of both."""
    one, other = measure(readings, method, data), measure(readings, than, data)
    text = f"{method} {mean_and_spread(one)}, {than} {mean_and_spread(other)}"
    text += f"; difference {mean_and_spread(differences(one, other), sign='+')}"
    if size:
        sizes = [mean([run[size] for run in readings.runs(m, data)]) for m in (method, than)]
        text += f"; {SIZES[size]} {sizes[0]:,.0f} and {sizes[1]:,.0f}"
    return text


def dylora_saves_time(readings: Readings, data: str) -> Finding:
    """One DyLoRA run for all ranks against one LoRA run per rank; seconds depend on no rate."""
    own = readings.step_seconds("dylora", data)
    each = [readings.step_seconds(at_rank(rank), data) for rank in range(1, RANK + 1)]
    times = [sum(runs) / seconds for *runs, seconds in zip(*each, own, strict=True)]
    return Finding(
        f"one DyLoRA run takes 4 to 7 times less time than LoRA runs at all {RANK} ranks",
        data,
        f"{mean_and_spread(times, 1)} times less (equal steps: {RANK} if a step takes as long)",
        is_above(times, TIMES),
    )


def dylora_beats_truncation(readings: Readings, data: str) -> Finding:
    """At every rank below the full one."""
    lora, dylora = readings.by_rank("lora", data), readings.by_rank("dylora", data)
    gap = [mean(differences(high, low)[:-1]) for high, low in zip(lora, dylora, strict=True)]
    dylora_means, lora_means = ([mean(seed[:-1]) for seed in losses] for losses in (dylora, lora))
    finding = Finding(
        f"DyLoRA truncated to ranks 1 to {RANK - 1} is better than a truncated LoRA",
        data,
        f"mean over the ranks: dylora {mean_and_spread(dylora_means)}, truncated lora "
        f"{mean_and_spread(lora_means)}; difference {mean_and_spread([-g for g in gap], sign='+')}",
        is_above(gap),
    )
    return _judged(readings, finding, ("dylora", "lora"))


def dylora_keeps_quality(readings: Readings, data: str) -> Finding:
    """At every rank, compared with LoRA trained at that rank."""
    each = [readings.losses(at_rank(rank), data) for rank in range(1, RANK + 1)]
    separate = [mean(seed) for seed in zip(*each, strict=True)]
    own = [mean(losses) for losses in readings.by_rank("dylora", data)]
    gap = differences(separate, own)
    finding = Finding(
        "DyLoRA is no worse than LoRA trained at each rank",
        data,
        f"mean over ranks 1 to {RANK}: dylora {mean_and_spread(own)}, separate runs "
        f"{mean_and_spread(separate)}; difference {mean_and_spread([-g for g in gap], sign='+')}",
        is_not_below(gap),
    )
    return _judged(readings, finding, ("dylora", *(at_rank(rank) for rank in range(1, RANK + 1))))


def loftq_starts_nearer(readings: Readings, data: str) -> Finding:
    """Before training: gap to the loss of the unquantised base, compared with the 4-bit base.

    No verdict: models with equal losses may be far apart, and quantisation may lower a loss.
    """
    plain = readings.starts("unquantised", data)
    loftq, nf4 = (
        [abs(gap) for gap in differences(readings.starts(method, data), plain)]
        for method in ("loftq", "lora")
    )
    return Finding(
        "LoftQ starts closer to the unquantised base than the 4-bit base is",
        data,
        f"distance to the held-out loss of the unquantised base: loftq "
        f"{mean_and_spread(loftq, 4)}, 4-bit base {mean_and_spread(nf4, 4)}",
        "no verdict",
        "a gap between losses is no distance between models",
    )


FIRST = Readings.first_steps

CLAIMS: tuple[Claim, ...] = (
    lower("OLoRA's loss falls faster than LoRA's in the first steps", "olora", "lora", FIRST),
    lower("PiSSA's loss falls faster than LoRA's in the first steps", "pissa", "lora", FIRST),
    dylora_saves_time,
    dylora_beats_truncation,
    dylora_keeps_quality,
    lower("AdaLoRA is better than LoRA at equal budget", "adalora", "lora", size="components"),
    lower("SoRA is better than LoRA at equal budget", "sora", "lora", size="components"),
    lower("PRILoRA is better than LoRA at equal budget", "prilora", "lora", size="components"),
    no_higher("MELoRA is as good as LoRA with fewer parameters", "melora", "lora", size="trained"),
    lower(
        "MELoRA is better than LoRA with as many parameters", "melora", at_rank(4), size="trained"
    ),
    no_higher(
        "LoRA-Mini is as good as LoRA with fewer parameters", "lora_mini", "lora", size="trained"
    ),
    lower(
        "LoRA-Mini is better than LoRA with about as many parameters",
        "lora_mini",
        at_rank(1),
        size="trained",
    ),
    no_higher(
        "XGBLoRA is as good as LoRA with fewer parameters", "xgblora", "lora", size="trained"
    ),
    lower(
        "XGBLoRA is better than LoRA with the rank of one booster",
        "xgblora",
        at_rank(1),
        size="trained",
    ),
    lower("COLA is better than LoRA at equal steps", "cola", "lora"),
    lower("DoRA is better than LoRA at a high rank", "dora-high-rank", "lora-high-rank"),
    lower(
        "rsLoRA is better than LoRA at a high rank with the alpha of the low rank",
        "rslora-high-rank",
        "lora-high-rank-same-alpha",
    ),
    lower("LoftQ is better than LoRA at 4 bit", "loftq", "lora"),
    loftq_starts_nearer,
    lower("LoRA+ is better than LoRA at equal steps", "lora_plus", "lora"),
    no_higher("MoRA is as good as LoRA with as many parameters", "mora", "lora", size="trained"),
    lower("RM-LoRA is better than LoRA at equal budget", "rm_lora", "lora"),
    lower("BA-LoRA is better than PiSSA", "ba_lora", "pissa"),
)


def findings(readings: Readings, materials: Sequence[str]) -> list[Finding]:
    """Every claim on every data set that has its runs."""
    found = []
    for claim in CLAIMS:
        for data in materials:
            try:
                found.append(claim(readings, data))
            except Missing:
                continue
    return found
