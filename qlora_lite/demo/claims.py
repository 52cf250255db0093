"""What the demo claims. A check returns the sentence to print, or raises BrokenClaim."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from qlora_lite.foundation.errors import CheckError
from qlora_lite.foundation.units import format_bytes
from qlora_lite.report.contents import Sample
from qlora_lite.run.merge_check import LABELS
from qlora_lite.run.merging import MergeResult

MIN_LOSS_DROP = 0.1
"""Relative drop of the held-out loss."""
MIN_AGREEMENT = {"fp32": 0.95, "bf16": 0.9}
"""Top-1 agreement of the model merged on the base as trained, by the dtype that both compute in."""
MAX_PEAK_SHARE = 1.1
"""Peak memory relative to the plan, which is fitted to one kind of machine."""
MAX_LENGTH_SHARE = 0.5
"""Words of the real model's answers after training, relative to those before."""

Events = Sequence[dict[str, Any]]

_TIMES = {"seconds", "tokens_per_second", "peak_bytes"}


class BrokenClaim(CheckError):
    """A claim of the demo does not hold."""


def check_resume(before: Events, after: Events, checkpoint: int) -> str:
    """The steps after the last checkpoint of the killed process were repeated bit for bit.

    Args:
        before: events that the killed process had logged.
        after: events of the whole run.
        checkpoint: the last step that the killed process had saved.

    Raises:
        BrokenClaim: if a repeated step differs, or none was repeated.
    """
    lost = [_numbers(event) for event in before if event["step"] > checkpoint]
    again = [_numbers(event) for event in after if event["step"] > checkpoint][: len(lost)]
    if not lost or lost != again:
        raise BrokenClaim(f"the resumed run differs from the killed one: {lost} became {again}")
    steps = f"{checkpoint + 1} to {lost[-1]['step']}"
    return (
        f"steps {steps} were lost and repeated: the same losses and gradient norms to the last bit"
    )


def _numbers(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in _TIMES}


def check_learning(events: Events) -> str:
    """The held-out loss fell by `MIN_LOSS_DROP`.

    Raises:
        BrokenClaim: if it did not.
    """
    losses = [event["heldout_loss"] for event in events if "heldout_loss" in event]
    first, last = losses[0], losses[-1]
    if not last <= (1 - MIN_LOSS_DROP) * first:
        raise BrokenClaim(
            f"the held-out loss fell too little: from {first:.3f} to {last:.3f}, "
            f"needed is {MIN_LOSS_DROP:.0%}"
        )
    return f"held-out loss {first:.3f} -> {last:.3f}"


def check_memory(sidecar: Mapping[str, Any]) -> str:
    """The peak of the training processes is at most `MAX_PEAK_SHARE` of the plan.

    Args:
        sidecar: of the finished run, with `predicted_peak_bytes` and `peak_bytes`.

    Raises:
        BrokenClaim: if it is larger.
    """
    planned_bytes, peak_bytes = sidecar["predicted_peak_bytes"], sidecar["peak_bytes"]
    share = peak_bytes / planned_bytes
    figures = (
        f"{format_bytes(peak_bytes)}, planned {format_bytes(planned_bytes)} ({share - 1:+.0%})"
    )
    if share > MAX_PEAK_SHARE:
        raise BrokenClaim(f"training needed more memory than planned: {figures}")
    return f"peak memory {figures}"


def check_merge(result: MergeResult, *, is_fp32: bool) -> str:
    """The merged model is the trained one, and the better merge was written.

    Args:
        is_fp32: training computed in fp32, so that the merge before rounding can be exact.

    Raises:
        BrokenClaim: if the merge differs before rounding (fp32), if the merge on the base as
            trained agrees with the trained model less than `MIN_AGREEMENT`, if the merge with the
            higher held-out loss was written, or if the files were not read back.
    """
    if is_fp32 and (result.exact is None or not result.exact.is_exact):
        raise BrokenClaim(f"the fp32 merge differs from the trained model: {result.exact}")
    merges = {row.candidate: row for row in result.table[1:]}
    agreement = merges[LABELS["trained"]].agreement or 0.0
    if agreement < MIN_AGREEMENT["fp32" if is_fp32 else "bf16"]:
        raise BrokenClaim(
            f"the merge on the base as trained predicts the same token as the trained model at "
            f"only {agreement:.1%} of the positions"
        )
    written = merges[LABELS[result.base]]
    losses = {name: row.loss for name, row in merges.items()}
    if not written.written or written.loss > min(losses.values()):
        raise BrokenClaim(f"the merge with the higher held-out loss was written: {losses}")
    if result.written is None:
        raise BrokenClaim("the written files were not read back")
    parts = [
        f"merged on the base as trained, the model predicts the same token as the trained one at "
        f"{agreement:.1%} of the positions",
        f"written is the better one, {LABELS[result.base]}, and transformers reads it back",
    ]
    if result.exact is not None:
        error = result.exact.relative_error
        parts.insert(
            0, f"merged in fp32, the logits equal those of base and adapter to {error:.0e}"
        )
    return "; ".join(parts)


def check_answers(samples: Sequence[Sample]) -> str:
    """The answers became short: at most `MAX_LENGTH_SHARE` of their words.

    Raises:
        BrokenClaim: if they did not, or an answer is empty.
    """
    before, after = _words(s.before for s in samples), _words(s.after for s in samples)
    expected = _words(s.expected or "" for s in samples)
    if min(after) == 0 or mean(after) > MAX_LENGTH_SHARE * mean(before):
        raise BrokenClaim(f"the answers did not become short: {before} words became {after}")
    return (
        f"words per answer {mean(before):.0f} -> {mean(after):.0f}, "
        f"{mean(expected):.0f} in the documentation"
    )


def _words(texts: Iterable[str]) -> list[int]:
    return [len(text.split()) for text in texts]
