"""Long rows dropped, truncated or split, and percentiles of lengths."""

from qlora_lite.data.encoding import Encoded
from qlora_lite.data.lengths import fit, percentile, split

ROW = Encoded([1, 2, 3, 4, 5, 6], [False] + [True] * 5)


def test_each_policy_fits_a_long_row():
    assert fit(ROW, 6, "error", keeps_first=True) == [ROW]
    assert fit(ROW, 5, "drop", keeps_first=True) == []
    assert fit(ROW, 5, "truncate", keeps_first=True) == [
        Encoded([1, 2, 3, 4, 5], [False, True, True, True, True])
    ]
    assert fit(ROW, 5, "split", keeps_first=True) == [
        Encoded([1, 2, 3, 4, 5], [False, True, True, True, True]),
        Encoded([1, 6], [False, True]),
    ]


def test_a_piece_starts_with_bos_or_else_with_the_last_token_of_the_previous_piece():
    assert [p.ids for p in split(ROW, 3, keeps_first=False)] == [[1, 2, 3], [3, 4, 5], [5, 6]]
    assert [p.ids for p in split(ROW, 3, keeps_first=True)] == [[1, 2, 3], [1, 4, 5], [1, 6]]
    assert [p.loss_mask for p in split(ROW, 3, keeps_first=True)][1:] == [
        [False, True, True],
        [False, True],
    ]


def test_a_percentile_is_one_of_the_lengths():
    assert [percentile(range(1, 101), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7], 50) == 7
