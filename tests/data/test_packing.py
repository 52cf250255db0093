"""Every row in one bin, and little empty space."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.packing import pack, pack_in_windows

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@given(LENGTHS)
def test_every_row_is_in_exactly_one_bin(lengths):
    bins = pack(lengths, 100)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= 100 for members in bins)


@given(LENGTHS, st.randoms())
def test_the_order_of_the_rows_does_not_change_the_number_of_bins(lengths, rng):
    shuffled = rng.sample(lengths, len(lengths))
    assert len(pack(shuffled, 100)) == len(pack(lengths, 100))


@given(LENGTHS)
def test_no_two_bins_fit_into_one(lengths):
    sizes = sorted(sum(lengths[i] for i in members) for members in pack(lengths, 100))
    assert all(a + b > 100 for a, b in pairwise(sizes))


def test_rows_of_realistic_lengths_leave_little_empty_space():
    rng = random.Random(0)
    lengths = [min(1024, round(rng.lognormvariate(5.5, 0.6))) for _ in range(5000)]
    assert len(pack(lengths, 1024)) <= 1.01 * sum(lengths) / 1024


def test_a_row_goes_into_the_fullest_bin_that_has_room():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_windows_are_packed_separately():
    assert pack_in_windows([3, 2, 1, 0], [5, 5, 5, 5], 20, window=2) == [[3, 2], [1, 0]]
