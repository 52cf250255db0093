"""The data of a report: what a page shows, and its form as JSON.

Long runs are thinned to what a screen can show; `metrics.jsonl` has all steps.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from qlora_lite.foundation.files import parse_json
from qlora_lite.report.charts import is_drawable

Metrics = Sequence[Mapping[str, Any]]

MAX_EVENTS = 600
"""Metrics kept in a page: about one per pixel of a curve, and 150 kB of JSON."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answers of the bare base and of the trained model."""

    prompt: str
    before: str
    after: str
    expected: str | None


@dataclass(frozen=True)
class MergeRow:
    """One candidate of a merge, scored on the held-out rows."""

    candidate: str
    loss: float
    agreement: float | None
    """Top-1 agreement with the adapter on its base: share of positions."""
    written: bool


@dataclass(frozen=True)
class Report:
    """What the page shows. All values can be written as JSON."""

    title: str
    recipe: Mapping[str, Any]
    metrics: Metrics
    """Events of `metrics.jsonl`: training steps have `loss`, evaluations `heldout_loss`."""
    facts: Mapping[str, str]
    memory: Sequence[tuple[str, int, int | None]]
    """(part, predicted bytes, measured bytes or None); the first row is the peak."""
    samples: Sequence[Sample]
    merges: Sequence[MergeRow] = ()


def to_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps(asdict(report))


def from_json(text: str) -> Report:
    """The inverse of `to_json`; sequences become tuples.

    Raises:
        ValueError: if it is not what `to_json` wrote.
    """
    fields = parse_json(text)
    # a half of a surrogate pair is text for us, but not for pydantic
    _REPORT.validate_python(json.loads(_SURROGATE.sub("?", text)))
    return Report(
        title=fields["title"],
        recipe=fields["recipe"],
        metrics=tuple(fields["metrics"]),
        facts=fields["facts"],
        memory=tuple((what, predicted, measured) for what, predicted, measured in fields["memory"]),
        samples=tuple(Sample(**sample) for sample in fields["samples"]),
        merges=tuple(MergeRow(**row) for row in fields["merges"]),
    )


_REPORT = TypeAdapter(Report)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def thinned(metrics: Metrics) -> Metrics:
    """At most `MAX_EVENTS` of the events; applying it twice changes nothing.

    The lowest and the highest loss of each stretch of steps are kept, so that no spike is lost.
    """
    if len(metrics) <= MAX_EVENTS:
        return metrics
    kept: set[int] = set()
    for key in ("loss", "heldout_loss"):
        indices = [i for i, event in enumerate(metrics) if key in event]
        losses = {i: y if is_drawable(y := metrics[i][key]) else math.inf for i in indices}
        stretch = math.ceil(len(indices) / (MAX_EVENTS // 4 - 1)) or 1
        for start in range(0, len(indices), stretch):
            part = indices[start : start + stretch]
            kept |= {min(part, key=losses.__getitem__), max(part, key=losses.__getitem__)}
        kept |= {*indices[:1], *indices[-1:]}
    return tuple(metrics[i] for i in sorted(kept))
