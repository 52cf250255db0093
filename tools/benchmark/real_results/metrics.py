"""Score answers against their references."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from itertools import zip_longest
from typing import Any

from qlora_lite.foundation.errors import RecipeError

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MARK = "####"
"""Stands before the final number of a solution in GSM8K."""

References = Sequence[Sequence[str]]
"""Of every answer, all its references."""


def measure(metric: str, answers: Sequence[str], references: References) -> dict[str, Any]:
    """The value of a metric by its name, with what is needed to repeat it."""
    if metric == "bleu":
        return bleu(answers, references)
    correct = {"accuracy": is_label, "exact match": is_number}[metric]
    hits = [correct(a, r[0]) for a, r in zip(answers, references, strict=True)]
    return {metric: sum(hits) / len(hits)}


def require_sacrebleu() -> None:
    """Fail before anything is measured.

    Raises:
        RecipeError: if sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise RecipeError(
            "sacrebleu is needed for BLEU. Install it: pip install 'qlora-lite[bench]'"
        ) from None


def bleu(answers: Sequence[str], references: References) -> dict[str, Any]:
    """Corpus BLEU (0 to 100) against all references, and the signature of sacrebleu.

    sacrebleu takes one stream per reference; streams of questions with fewer are filled with None.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    streams = [list(stream) for stream in zip_longest(*references)]
    score = metric.corpus_score(list(answers), streams).score
    return {"bleu": score, "signature": str(metric.get_signature())}


def is_label(answer: str, reference: str) -> bool:
    """Whether the first 0 or 1 of an answer is the label."""
    found = re.search(r"[01]", answer)
    return found is not None and found[0] == reference.strip()


def is_number(answer: str, reference: str) -> bool:
    """Whether both end in the same number."""
    found = final_number(answer)
    return found is not None and found == final_number(reference)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or the last number of a text without `####`.

    Commas between digits and a dollar sign are ignored: `$1,200.00` is 1200.
    """
    _, mark, after = text.rpartition(MARK)
    numbers = NUMBER.findall(after)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
