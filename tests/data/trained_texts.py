"""The texts of a row that are trained."""

from collections.abc import Sequence
from itertools import groupby


def trained_texts(tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> list[str]:
    """The text of every unbroken run of trained tokens.

    Decoded with what is before it: some tokenizers drop a space at the start of a text.
    """
    texts = []
    end = 0
    for is_trained, run in groupby(mask):
        start, end = end, end + len(list(run))
        if is_trained:
            before = tokenizer.decode(ids[:start])
            texts.append(tokenizer.decode(ids[:end])[len(before) :])
    return texts
