"""What becomes of a row that is longer than `max_tokens`."""

from collections.abc import Sequence

from qlora_lite.data.settings import TooLong
from qlora_lite.data.templates import Encoded


def fit(row: Encoded, max_tokens: int, policy: TooLong, *, keeps_first: bool) -> list[Encoded]:
    """The row, its pieces, its beginning, or nothing. For `error` it has to fit."""
    if len(row.ids) <= max_tokens:
        return [row]
    assert policy != "error", len(row.ids)
    if policy == "drop":
        return []
    if policy == "truncate":
        return [Encoded(row.ids[:max_tokens], row.loss_mask[:max_tokens])]
    return split(row, max_tokens, keeps_first=keeps_first)


def split(row: Encoded, max_tokens: int, *, keeps_first: bool) -> list[Encoded]:
    """Pieces of a text in which every token is trained exactly once.

    A piece begins with one token that is only read: the row's first if `keeps_first` (BOS), else
    the last of the piece before.
    """
    pieces = []
    for start in range(1, len(row.ids), max_tokens - 1):
        head = row.ids[0] if keeps_first else row.ids[start - 1]
        stop = start + max_tokens - 1
        pieces.append(Encoded([head, *row.ids[start:stop]], [False, *row.loss_mask[start:stop]]))
    return pieces


def percentile(lengths: Sequence[int], percent: int) -> int:
    """The length that `percent` of the rows do not exceed."""
    ordered = sorted(lengths)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
