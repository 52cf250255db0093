"""Charts: round ticks, gaps for values that are not finite, and any list of numbers."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.report.charts import Curve, chart, smooth, tick_labels, ticks

NAN, INF = math.nan, math.inf


def line(*values: float, dots: bool = False) -> Curve:
    return Curve("loss", list(enumerate(values, start=1)), "train", dots)


def curve_path(svg: str) -> str:
    return re.search(r'<path class="train" d="([^"]*)"/>', svg)[1]


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (0, 400, 4, ["0", "100", "200", "300", "400"]),
        (1.31, 3.43, 6, ["1.5", "2.0", "2.5", "3.0"]),
        (0, 2e-4, 4, ["0", "0.5e-4", "1.0e-4", "1.5e-4", "2.0e-4"]),
        (0, 10_000, 4, ["0", "5,000", "10,000"]),
        (2.0001, 2.0004, 3, ["2.0001", "2.0002", "2.0003", "2.0004"]),
        (0, 3e7, 3, ["0", "1e7", "2e7", "3e7"]),
    ],
)
def test_ticks_are_round_numbers_with_distinct_labels(low, high, most, labels):
    assert tick_labels(ticks(low, high, most)) == labels


def test_outward_ticks_enclose_the_values():
    assert ticks(1.31, 3.43, 6, outward=True) == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert ticks(1.0, 3.0, 4, outward=True) == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_steps_are_marked_at_whole_numbers():
    assert ticks(1, 3, 8, whole=True) == [1, 2, 3]


def test_smoothing_is_the_mean_around_each_point():
    points = [(float(x), float(x**2)) for x in range(80)]
    means, window = smooth(points)
    assert window == 5
    assert means[0] == (0, (0 + 1 + 4) / 3)
    assert means[10] == (10, (64 + 81 + 100 + 121 + 144) / 5)
    assert means[79] == (79, (77**2 + 78**2 + 79**2) / 3)


def test_smoothing_skips_values_that_are_not_finite():
    points = [(float(x), NAN if x == 40 else 3.0) for x in range(80)]
    assert smooth(points) == ([(float(x), 3.0) for x in range(80)], 5)


def test_a_value_that_is_not_finite_leaves_a_gap():
    assert curve_path(chart("Loss", [line(3, 2, NAN, 1, INF)])).count("M") == 2
    assert curve_path(chart("Loss", [line(3, 2, 1)])).count("M") == 1


def test_the_highest_value_lies_above_the_lowest():
    x_first, y_first, x_last, y_last = map(
        float, re.findall(r"[\d.]+", curve_path(chart("Loss", [line(3, 1)])).replace("h0", ""))
    )
    assert x_first < x_last
    assert y_first < y_last  # SVG counts downwards


def test_points_show_their_value_unless_there_are_very_many():
    assert "<title>step 2: 1.25</title>" in chart("Loss", [line(3, 1.25, dots=True)])
    assert "<title>" not in chart("Loss", [line(*range(1000), dots=True)])


def test_a_chart_has_a_label_for_screen_readers():
    svg = chart("Loss <mean>", [line(3, 2, 1.5)])
    label = "Loss &lt;mean&gt;. loss: 3 at step 1, 1.5 at step 3"
    assert f'role="img" aria-label="{label}"' in svg


def test_a_chart_without_values_shows_that():
    assert "no values" in chart("Loss", [line(NAN, INF), line()])


@given(st.lists(st.floats(allow_subnormal=True), max_size=30), st.booleans())
def test_any_numbers_are_drawn_inside_the_frame(values, from_zero):
    svg = chart("Loss", [line(*values)], from_zero=from_zero)
    ElementTree.fromstring(svg)
    for path in re.findall(r'<path class="train" d="([^"]*)"', svg):
        for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path):
            assert 0 <= float(x) <= 360
            assert 0 <= float(y) <= 190
