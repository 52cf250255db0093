"""Each claim of the demo holds for results that fulfil it, and fails for results that do not."""

from pathlib import Path

import pytest
import torch

from qlora_lite.demo import claims
from qlora_lite.demo.claims import BrokenClaim
from qlora_lite.export.verify import compare
from qlora_lite.report.contents import MergeRow, Sample
from qlora_lite.run.merge_check import LABELS
from qlora_lite.run.merging import MergeResult


def events(*losses, start=31):
    return [{"step": start + i, "loss": loss, "seconds": i} for i, loss in enumerate(losses)]


def test_repeated_steps_must_be_the_same_to_the_last_bit():
    before = events(3.0, 2.5, 2.25)
    again = [dict(event, seconds=99.0) for event in before]
    text = claims.check_resume(before, [*again, *events(2.0, start=34)], 30)
    assert text.startswith("steps 31 to 33 were lost and repeated")
    with pytest.raises(BrokenClaim, match="differs from the killed one"):
        claims.check_resume(before, events(3.0, 2.5, 2.25 + 2**-40), 30)


def test_a_resumed_run_without_repeated_steps_is_refused():
    with pytest.raises(BrokenClaim):
        claims.check_resume(events(3.0, start=30), events(3.0, start=30), 30)


@pytest.mark.parametrize("last", [3.61, float("nan")])
def test_the_held_out_loss_must_fall_by_a_tenth(last):
    def scorings(*losses):
        return [{"step": i, "heldout_loss": loss} for i, loss in enumerate(losses)]

    assert claims.check_learning(scorings(4.0, 3.59)) == "held-out loss 4.000 -> 3.590"
    with pytest.raises(BrokenClaim, match=f"from 4.000 to {last:.3f}"):
        claims.check_learning(scorings(4.0, last))


def test_the_peak_must_be_within_the_plan():
    def sidecar(planned, peak):
        return {"predicted_peak_bytes": planned, "peak_bytes": peak}

    text = claims.check_memory(sidecar(2**30, 2**29))
    assert text == "peak memory 512 MiB, planned 1.00 GiB (-50%)"
    assert claims.check_memory(sidecar(1000, 1099)).endswith("(+10%)")
    with pytest.raises(BrokenClaim, match=r"more memory than planned: 2\.00 GiB, planned 1\.00"):
        claims.check_memory(sidecar(2**30, 2**31))
    with pytest.raises(BrokenClaim):
        claims.check_memory(sidecar(1000, 1101))


def merged(base="trained", exact=1.0, agreement=0.96, losses=(2.0, 2.1), is_read_back=True):
    """A merge whose logits before rounding are the trained ones times `exact`.

    Args:
        base: the one that was written.
        agreement: of the merge on the base as trained.
        losses: on the base as trained and on the original one.
    """
    logits = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    rows = [
        MergeRow(LABELS[name], loss, share, name == base)
        for name, loss, share in zip(("trained", "original"), losses, (agreement, 0.7), strict=True)
    ]
    return MergeResult(
        out=Path("merged"),
        base=base,
        dtype=torch.bfloat16,
        num_bytes=1,
        table=(MergeRow("adapter on its base", 2.0, None, False), *rows),
        exact=None if exact is None else compare(logits, logits * exact),
        written=compare(logits, logits) if is_read_back else None,
        notes=(),
    )


def test_a_merge_must_be_exact_in_fp32():
    assert "merged in fp32" in claims.check_merge(merged(), is_fp32=True)
    for wrong in (merged(exact=1.01), merged(exact=None)):
        with pytest.raises(BrokenClaim, match="fp32 merge differs"):
            claims.check_merge(wrong, is_fp32=True)
    assert "fp32" not in claims.check_merge(merged(exact=None), is_fp32=False)


@pytest.mark.parametrize("compute", claims.MIN_AGREEMENT)
@pytest.mark.parametrize("base", ["trained", "original"])
def test_merged_on_the_base_as_trained_it_must_predict_the_same_tokens(compute, base):
    def check(agreement):
        losses = (2.0, 2.1) if base == "trained" else (2.1, 2.0)
        result = merged(base, agreement=agreement, losses=losses)
        return claims.check_merge(result, is_fp32=compute == "fp32")

    lowest = claims.MIN_AGREEMENT[compute]
    assert f"at {lowest:.1%} of the positions" in check(lowest)
    with pytest.raises(BrokenClaim, match="only"):
        check(lowest - 0.01)


def test_the_better_merge_must_be_written():
    text = claims.check_merge(merged("original", losses=(2.1, 2.0)), is_fp32=True)
    assert "merged on the original base" in text
    for wrong in (merged("original"), merged("trained", losses=(2.1, 2.0))):
        with pytest.raises(BrokenClaim, match="higher held-out loss"):
            claims.check_merge(wrong, is_fp32=True)


def test_the_files_must_be_read_back():
    with pytest.raises(BrokenClaim, match="not read back"):
        claims.check_merge(merged(is_read_back=False), is_fp32=True)


def sample(before, after):
    return Sample("What is it?", before, after, "A thing.")


def test_the_answers_must_become_short():
    text = claims.check_answers([sample("word " * 40, "A short thing."), sample("word " * 20, "A")])
    assert text == "words per answer 30 -> 2, 2 in the documentation"
    for after in ("word " * 21, ""):
        with pytest.raises(BrokenClaim, match="did not become short"):
            claims.check_answers([sample("word " * 40, after)])
