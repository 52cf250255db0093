"""The HTML page of a run: curves, samples, predicted and measured memory, settings.

The file is self-contained: styles and drawings are inline, no script runs, and a content security
policy forbids every request. The report is embedded as JSON, so that `merge` can read the page,
add its table and write it again.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import write_text
from qlora_lite.foundation.units import format_bytes, format_count, format_seconds
from qlora_lite.report import charts
from qlora_lite.report.charts import Curve, is_drawable
from qlora_lite.report.contents import (
    MAX_EVENTS,
    Metrics,
    Report,
    Sample,
    from_json,
    thinned,
    to_json,
)

# -- write and read --------------------------------------------------------------------------------


def write(path: Path, report: Report) -> None:
    """Write the page atomically, replacing an existing one."""
    write_text(path, render(report))


def read(path: Path) -> Report:
    """The report in a page that `write` wrote; sequences become tuples.

    Raises:
        RunError: if the page does not exist or was not written by `write`.
    """
    page = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    try:
        if data is None:
            raise ValueError("it has none")
        return from_json(data[1])
    except ValueError as error:
        raise RunError(
            f"{path} holds no report data ({error}). Restore the page that `qlora-lite train` "
            "wrote, delete it, or train into another output=..."
        ) from None


# -- the page, from top to bottom ------------------------------------------------------------------


def render(report: Report) -> str:
    """The page as HTML."""
    report = replace(report, metrics=thinned(report.metrics))
    parts = (_key_figures, _curves, _samples, _merges, _memory, _settings, _facts)
    body = "\n".join(part(report) for part in parts)
    data = to_json(report).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(report.title)}</title>
<style>{charts.STYLE}{_PAGE_STYLE}</style>
</head>
<body>
<main>
<header><p>qlora-lite · report of a run</p><h1>{_text(report.title)}</h1></header>
{body}
</main>
<script type="application/json" id="report">{data}</script>
</body>
</html>
"""


def _key_figures(report: Report) -> str:
    figures = []
    heldout = [p for p in _points(report.metrics, "heldout_loss") if is_drawable(p[1])]
    if heldout:
        (first, before), (last, after) = heldout[0], heldout[-1]
        note = f"{before:.3f} at step {first:,}" if last != first else f"at step {last:,}"
        figures.append(("held-out loss", f"{after:.3f}", note))
    training = [event for event in report.metrics if "loss" in event]
    if training:
        end = training[-1]
        seconds, tokens = end["seconds"], end["tokens"]
        steps = "1 step" if end["step"] == 1 else f"{end['step']:,} steps"
        figures.append(("training time", format_seconds(seconds), steps))
        speed = f"{tokens / seconds:,.0f} a second" if seconds else ""
        figures.append(("tokens", format_count(tokens), speed))
    if report.memory:
        _, predicted, measured = report.memory[0]
        note = f"{format_bytes(predicted)} predicted" if measured is not None else "predicted"
        peak = predicted if measured is None else measured
        figures.append(("peak memory", format_bytes(peak), note))
    cells = (
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in figures
    )
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _curves(report: Report) -> str:
    metrics = report.metrics
    if not metrics:
        return _section("Curves", "<p>No step was logged.</p>")
    figures = (
        _figure("Loss per trained token", _loss_chart(metrics)),
        _figure("Learning rate", _small_chart(metrics, "lr", "learning rate")),
        _figure("Gradient norm", _small_chart(metrics, "grad_norm", "gradient norm")),
        _figure("Speed", _small_chart(metrics, "tokens_per_second", "speed", "tokens a second")),
        _figure("Memory", _memory_chart(report)),
    )
    drawings = f'<div class="charts">{"".join(figures)}</div>'
    return _section("Curves", drawings + _scores(metrics) + _thinning(metrics))


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _loss_chart(metrics: Metrics) -> str:
    training = _points(metrics, "loss")
    means, window = charts.smooth(training)
    curves = [Curve("training", training, "raw" if window > 1 else "train")]
    if window > 1:
        curves.append(Curve(f"training, mean of {window} points", means, "train"))
    curves.append(Curve("held-out", _points(metrics, "heldout_loss"), "heldout", dots=True))
    return charts.chart("Loss", curves, size=(740, 300), from_zero=False)


def _small_chart(metrics: Metrics, key: str, name: str, unit: str = "") -> str:
    return charts.chart(name, [Curve(name, _points(metrics, key), "train")], unit)


def _memory_chart(report: Report) -> str:
    peaks = _points(report.metrics, "peak_bytes")
    highest = max((y for _, y in peaks if is_drawable(y)), default=0)
    unit, unit_bytes = ("GiB", 2**30) if highest >= 2**30 else ("MiB", 2**20)
    curves = [Curve("measured peak", [(x, y / unit_bytes) for x, y in peaks], "train")]
    if report.memory and peaks:
        predicted = report.memory[0][1] / unit_bytes
        ends = [(peaks[0][0], predicted), (peaks[-1][0], predicted)]
        curves.append(Curve("predicted", ends, "level"))
    return charts.chart("Memory", curves, unit)


def _points(metrics: Metrics, key: str) -> list[tuple[float, float]]:
    """(step, value) of the events that have this key."""
    return [(event["step"], event[key]) for event in metrics if event.get(key) is not None]


def _scores(metrics: Metrics) -> str:
    names = ("heldout_loss", "heldout_perplexity", "heldout_accuracy")
    rows = [
        (f"{event['step']:,}", *(_number(event.get(name)) for name in names))
        for event in metrics
        if "heldout_loss" in event
    ]
    if not rows:
        return ""
    table = _table("Scores on the held-out rows", ("step", "loss", "perplexity", "accuracy"), rows)
    return f"<details><summary>The held-out scores as numbers</summary>{table}</details>"


def _thinning(metrics: Metrics) -> str:
    if metrics[-1]["step"] <= MAX_EVENTS:
        return ""
    return "<p><small>Not all steps are shown; metrics.jsonl has all of them.</small></p>"


def _samples(report: Report) -> str:
    return _section("Before and after", "".join(_sample(sample) for sample in report.samples))


def _sample(sample: Sample) -> str:
    answers = {"prompt": sample.prompt, "before": sample.before, "after": sample.after}
    if sample.expected is not None:
        answers["expected"] = sample.expected
    cells = (
        f'<div class="{name}"><dt>{name}</dt><dd>{_text(text) or "<em>nothing</em>"}</dd></div>'
        for name, text in answers.items()
    )
    return f'<dl class="sample">{"".join(cells)}</dl>'


def _merges(report: Report) -> str:
    if not report.merges:
        return ""
    rows = [
        (
            _text(row.candidate),
            f"{row.loss:.4f}",
            "–" if row.agreement is None else f"{row.agreement:.2%}",
            "yes" if row.written else "",
        )
        for row in report.merges
    ]
    caption = "Scores on the held-out rows; agreement with the adapter on its quantised base"
    head = ("candidate", "loss", "top-1 agreement", "written")
    return _section("Merge", _table(caption, head, rows))


def _memory(report: Report) -> str:
    if not report.memory:
        return ""
    most = max(max(predicted, measured or 0) for _, predicted, measured in report.memory) or 1
    rows = []
    for what, predicted, measured in report.memory:
        bars = f'<i style="width:{predicted / most:.1%}"></i>'
        if measured is not None:
            bars += f'<i class="measured" style="width:{measured / most:.1%}"></i>'
        compared = f"{measured / predicted - 1:+.1%}" if measured is not None and predicted else ""
        found = "–" if measured is None else format_bytes(measured)
        rows.append((_text(what), format_bytes(predicted), found, compared, bars))
    caption = "Predicted by the plan (pale), and measured by the run"
    head = ("part", "predicted", "measured", "difference", "to scale")
    return _section("Memory", _table(caption, head, rows, kind="memory"))


def _settings(report: Report) -> str:
    if not report.recipe:
        return ""
    single = {name: value for name, value in report.recipe.items() if not _is_group(value)}
    groups = [("run", single)] if single else []
    groups += [(name, value) for name, value in report.recipe.items() if _is_group(value)]
    tables = (
        _table(_text(name), (), [(_text(k), _text(v)) for k, v in _flat(group)], kind="pairs")
        for name, group in groups
    )
    return _section("Settings", f'<div class="columns">{"".join(tables)}</div>')


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if _is_group(value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield prefix + name, text


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _facts(report: Report) -> str:
    rows = [(_text(name), _text(value)) for name, value in report.facts.items()]
    table = _table("How it was made", (), rows, kind="pairs") if rows else ""
    return _section("Facts", table)


def _section(heading: str, content: str) -> str:
    """A section of the page; empty if it has no content."""
    return f"<section><h2>{heading}</h2>{content}</section>" if content else ""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table with row headers in its first column; cells are HTML already."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    top = f"<thead><tr>{heads}</tr></thead>" if head else ""
    return f'<table class="{kind}"><caption>{caption}</caption>{top}<tbody>{lines}</tbody></table>'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def _text(text: str) -> str:
    """Any text as HTML: markup is escaped, control characters become their Unicode pictures."""
    printable = text.translate(_PICTURES).encode("utf-8", "replace").decode("utf-8")
    return html.escape(printable)


_PAGE_STYLE = """
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif;
  font-weight: 600; line-height: 1.2; }
h1 { font-size: 2.2rem; margin: .2rem 0 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 0 0 1rem; }
header p { margin: 0; }
section { margin-top: 2.8rem; border-top: 1px solid var(--rule); padding-top: 1.4rem; }
header p, dt, figcaption, caption, th, small, summary { color: var(--muted); font-size: .82rem;
  font-weight: 400; }
dl, dd, figure { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 1.2rem; }
.figures dd { font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.figures small { display: block; line-height: 1.5; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr));
  gap: 1.6rem 2rem; }
.charts figure:first-child { grid-column: 1 / -1; overflow-x: auto; }
.charts figure:first-child svg { min-width: 560px; }
figcaption { color: var(--ink); font-weight: 600; margin-bottom: .3rem; }
details { margin-top: 1.4rem; }
summary { cursor: pointer; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th:first-child, .pairs td { text-align: left; overflow-wrap: anywhere; }
tbody th { color: var(--ink); font-size: inherit; }
.memory tr > :last-child { text-align: left; }
.memory td:last-child { width: 30%; padding: .55rem 0 0; }
.memory tbody tr:first-child > * { font-weight: 600; border-bottom-color: var(--muted); }
.memory i { display: block; height: 5px; margin-bottom: 2px; background: var(--train);
  opacity: .35; }
.memory i.measured { opacity: 1; }
.columns { columns: 2 320px; column-gap: 2rem; }
.columns table { break-inside: avoid; margin-bottom: 1.4rem; }
.columns caption { font-weight: 600; color: var(--ink); }
.pairs th { width: 45%; color: var(--muted); }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr));
  gap: .8rem 1.6rem; padding-bottom: 1.4rem; margin-bottom: 1.4rem;
  border-bottom: 1px solid var(--rule); }
.sample:last-child { border: 0; margin: 0; padding: 0; }
.sample .prompt { grid-column: 1 / -1; }
.sample dd { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample .after dd { color: var(--train); }
@media (max-width: 560px) { .memory tr > :last-child { display: none; } }
@media print { details { display: none; } section { break-inside: avoid; } }
"""
