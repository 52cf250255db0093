"""The data of a report: JSON and thinning."""

import math

import pytest

from qlora_lite.report.contents import MAX_EVENTS, Report, from_json, thinned, to_json
from tests.report.reports import EMPTY, REPORT, long_run


@pytest.mark.parametrize("report", [REPORT, EMPTY])
def test_a_report_survives_json(report: Report):
    assert from_json(to_json(report)) == report


def test_thinning_keeps_short_runs_both_ends_and_every_spike():
    short = long_run(MAX_EVENTS // 2, scored_every=1)
    assert thinned(short) == short
    events = long_run(10_000, scored_every=100)
    events[5000] |= {"loss": 9.0}
    events[7000] |= {"loss": math.nan}
    kept = thinned(events)
    assert len(kept) <= MAX_EVENTS
    assert (kept[0], *kept[-2:]) == (events[0], *events[-2:])
    assert events[5000] in kept
    assert events[7000] in kept
    assert [event for event in kept if "heldout_loss" in event] == events[100::101]
    assert thinned(kept) == kept
