"""Drop, split or truncate rows that are longer than `max_tokens`."""

from collections.abc import Sequence

from qlora_lite.data.encoding import Encoded
from qlora_lite.data.settings import TooLong


def fit(row: Encoded, max_tokens: int, policy: TooLong, *, keeps_first: bool) -> list[Encoded]:
    """The row itself if it is short enough; otherwise its pieces, its start, or nothing.

    With the policy `error` the caller has checked that it is short enough.
    """
    if len(row.ids) <= max_tokens:
        return [row]
    assert policy != "error", len(row.ids)
    if policy == "drop":
        return []
    if policy == "truncate":
        return [Encoded(row.ids[:max_tokens], row.loss_mask[:max_tokens])]
    return split(row, max_tokens, keeps_first=keeps_first)


def split(row: Encoded, max_tokens: int, *, keeps_first: bool) -> list[Encoded]:
    """Pieces of a text such that every token is trained exactly once.

    Each piece starts with one token as context: the first of the row if `keeps_first` (BOS), else
    the last of the previous piece.
    """
    pieces = []
    for start in range(1, len(row.ids), max_tokens - 1):
        head = row.ids[0] if keeps_first else row.ids[start - 1]
        stop = start + max_tokens - 1
        pieces.append(Encoded([head, *row.ids[start:stop]], [False, *row.loss_mask[start:stop]]))
    return pieces


def percentile(lengths: Sequence[int], percent: int) -> int:
    """The smallest length such that `percent` % of the rows are not longer."""
    ordered = sorted(lengths)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
