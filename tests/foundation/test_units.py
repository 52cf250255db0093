"""Parsing and formatting of sizes, counts and durations."""

import pytest

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22GiB", 22 * 2**30),
        ("800 MB", 800_000_000),
        ("1.5gib", 3 * 2**29),
        ("4096", 4096),
        (4096, 4096),
        ("16 b", 16),
    ],
)
def test_a_size_is_parsed_with_its_unit(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "GiB", "12 parsecs", "-3GB", "1e9"])
def test_text_that_is_not_a_size_is_refused_with_an_example(text):
    with pytest.raises(RecipeError, match="22GiB"):
        parse_bytes(text)


def test_bytes_have_three_significant_digits():
    assert [format_bytes(n) for n in (0, 999, 1536, 1023 * 1024, 3_600_000_000)] == [
        "0 B",
        "999 B",
        "1.50 KiB",
        "1.00 MiB",
        "3.35 GiB",
    ]


def test_counts_and_durations_are_readable():
    assert [format_count(n) for n in (12, 41_900_000, 8_030_261_248)] == ["12", "41.9 M", "8.03 G"]
    assert [format_seconds(s) for s in (0.42, 12.3, 200, 7500)] == [
        "0.4 s",
        "12 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
