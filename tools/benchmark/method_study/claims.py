"""What each paper says, in numbers of this study.

A claim is a function of the readings and a data set. It raises `Missing` where its runs were not
made, and is left out then.
"""

from collections.abc import Callable, Sequence

from method_study.contenders import RANK, at_rank
from method_study.readings import Missing, Readings, mean
from method_study.verdict import LEAST, Finding, differences, is_above, is_not_below, spoken

Claim = Callable[[Readings, str], Finding]
Measure = Callable[[Readings, str, str], Sequence[float]]

TIMES = 4.0
"""One DyLoRA run instead of LoRA runs at every rank: the least that the paper says."""

SIZES = {"trained": "trained numbers", "components": "components left"}


def lower(
    claim: str, method: str, than: str, measure: Measure = Readings.losses, size: str = ""
) -> Claim:
    """The loss of a method is below that of another."""

    def check(readings: Readings, data: str) -> Finding:
        gap = differences(measure(readings, than, data), measure(readings, method, data))
        measured = _compared(readings, data, method, than, measure, size)
        return Finding(claim, data, measured, is_above(gap, LEAST))

    return check


def no_higher(
    claim: str, method: str, than: str, measure: Measure = Readings.losses, size: str = ""
) -> Claim:
    """The loss of a method is not above that of another."""

    def check(readings: Readings, data: str) -> Finding:
        gap = differences(measure(readings, than, data), measure(readings, method, data))
        measured = _compared(readings, data, method, than, measure, size)
        return Finding(claim, data, measured, is_not_below(gap))

    return check


def _compared(
    readings: Readings, data: str, method: str, than: str, measure: Measure, size: str
) -> str:
    """Both losses, their difference, and on request how large both are."""
    one, other = measure(readings, method, data), measure(readings, than, data)
    text = f"{method} {spoken(one)}, {than} {spoken(other)}"
    text += f"; difference {spoken(differences(one, other), sign='+')}"
    if size:
        sizes = [mean([run[size] for run in readings.runs(m, data)]) for m in (method, than)]
        text += f"; {SIZES[size]} {sizes[0]:,.0f} and {sizes[1]:,.0f}"
    return text


def dylora_saves_time(readings: Readings, data: str) -> Finding:
    """One run for all ranks against a run for each."""
    own = readings.step_seconds("dylora", data)
    each = [readings.step_seconds(at_rank(rank), data) for rank in range(1, RANK + 1)]
    times = [sum(runs) / seconds for *runs, seconds in zip(*each, own, strict=True)]
    return Finding(
        f"one DyLoRA run takes 4 to 7 times less time than LoRA runs at all {RANK} ranks",
        data,
        f"{spoken(times, 1)} times less (equal steps: {RANK} if a step takes as long)",
        is_above(times, TIMES),
    )


def dylora_beats_truncation(readings: Readings, data: str) -> Finding:
    """At every rank below the full one."""
    cut, whole = readings.by_rank("lora", data), readings.by_rank("dylora", data)
    gap = [mean(differences(c, w)[:-1]) for c, w in zip(cut, whole, strict=True)]
    return Finding(
        f"DyLoRA cut to ranks 1 to {RANK - 1} is better than a truncated LoRA",
        data,
        f"mean over the ranks: dylora {spoken([mean(w[:-1]) for w in whole])}, truncated lora "
        f"{spoken([mean(c[:-1]) for c in cut])}; difference {spoken([-g for g in gap], sign='+')}",
        is_above(gap),
    )


def dylora_keeps_quality(readings: Readings, data: str) -> Finding:
    """At every rank, beside a LoRA of that rank."""
    each = [readings.losses(at_rank(rank), data) for rank in range(1, RANK + 1)]
    separate = [mean(seed) for seed in zip(*each, strict=True)]
    own = [mean(losses) for losses in readings.by_rank("dylora", data)]
    gap = differences(separate, own)
    return Finding(
        "DyLoRA is no worse than LoRA trained at each rank",
        data,
        f"mean over ranks 1 to {RANK}: dylora {spoken(own)}, separate runs {spoken(separate)}; "
        f"difference {spoken([-g for g in gap], sign='+')}",
        is_not_below(gap),
    )


def loftq_starts_nearer(readings: Readings, data: str) -> Finding:
    """Before training, beside the 4-bit base and the unquantised one."""
    plain = readings.starts("unquantised", data)
    loftq, nf4 = (
        [abs(gap) for gap in differences(readings.starts(method, data), plain)]
        for method in ("loftq", "lora")
    )
    return Finding(
        "LoftQ starts nearer to the unquantised base than a 4-bit base does",
        data,
        f"held-out loss off the unquantised base's: loftq {spoken(loftq, 4)}, "
        f"plain start {spoken(nf4, 4)}",
        is_above(differences(nf4, loftq)),
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
    no_higher("MELoRA is as good as LoRA with fewer numbers", "melora", "lora", size="trained"),
    lower("MELoRA is better than LoRA of as many numbers", "melora", at_rank(4), size="trained"),
    no_higher(
        "LoRA-Mini is as good as LoRA with fewer numbers", "lora_mini", "lora", size="trained"
    ),
    lower(
        "LoRA-Mini is better than LoRA of about as many numbers",
        "lora_mini",
        at_rank(1),
        size="trained",
    ),
    no_higher("XGBLoRA is as good as LoRA with fewer numbers", "xgblora", "lora", size="trained"),
    lower(
        "XGBLoRA is better than LoRA of the rank of a booster",
        "xgblora",
        at_rank(1),
        size="trained",
    ),
    lower("COLA is better than LoRA at equal steps", "cola", "lora"),
    lower("DoRA is better than LoRA at a high rank", "dora-high-rank", "lora-high-rank"),
    lower(
        "rsLoRA is better than LoRA at a high rank, with the alpha of the low one",
        "rslora-high-rank",
        "lora-high-rank-same-alpha",
    ),
    lower("LoftQ is better than the plain start at 4 bit", "loftq", "lora"),
    loftq_starts_nearer,
    lower("LoRA+ is better than LoRA at equal steps", "lora_plus", "lora"),
    no_higher("MoRA is as good as LoRA of as many numbers", "mora", "lora", size="trained"),
    lower("RM-LoRA is better than LoRA at equal budget", "rm_lora", "lora"),
    lower("BA-LoRA is better than PiSSA", "ba_lora", "pissa"),
)


def findings(readings: Readings, materials: Sequence[str]) -> list[Finding]:
    """Every claim on every data set for which its runs were made."""
    found = []
    for claim in CLAIMS:
        for data in materials:
            try:
                found.append(claim(readings, data))
            except Missing:
                continue
    return found
