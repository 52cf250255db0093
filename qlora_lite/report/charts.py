"""Line charts as SVG, without a plotting library.

Colours come from the variables in `STYLE`, which follow the light or dark theme of the browser. A
page includes `STYLE` in its styles and the charts in its body. Values that are not finite leave a
gap in their curve.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

STYLE = """
:root { --paper: #fdfcf9; --ink: #22262b; --muted: #666b73; --rule: #e4e0d6;
  --train: #2a6ab0; --heldout: #bf4a12; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e4e2dc; --muted: #9b9da3;
  --rule: #2e3237; --train: #7db1ec; --heldout: #f2965f; } }
svg.chart { display: block; width: 100%; height: auto; }
svg.chart text { font: 11px system-ui, sans-serif; fill: var(--muted); }
svg.chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .grid { stroke: var(--rule); stroke-width: 1; }
svg.chart .train { stroke: var(--train); }
svg.chart .raw { stroke: var(--train); stroke-width: 1; stroke-opacity: .35; }
svg.chart .heldout { stroke: var(--heldout); }
svg.chart .level { stroke: var(--muted); stroke-width: 1.2; stroke-dasharray: 5 4; }
svg.chart circle { fill: var(--paper); stroke-width: 1.6; }
"""

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 24, 24, 22
_MOST_DOTS = 60
_ROUNDING = 1e-9
"""How far, in ticks, rounding may move a value."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    """For the legend and the label of screen readers."""
    points: Sequence[tuple[float, float]]
    kind: str
    """CSS class in `STYLE`: train, raw, heldout or level."""
    dots: bool = False
    """Mark every point and show its value under the pointer, unless there are very many."""

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """The points with drawable values."""
        return [(x, y) for x, y in self.points if is_drawable(y)]


def chart(
    title: str,
    curves: Sequence[Curve],
    unit: str = "",
    size: tuple[int, int] = (360, 190),
    from_zero: bool = True,
) -> str:
    """Curves over steps. `unit` is the label above the vertical axis, `title` is for screen
    readers."""
    width, height = size
    curves = [curve for curve in curves if curve.drawn]
    if not curves:
        body = f'<text x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle">no values</text>'
        return _svg(size, f"{title}: no values", body)
    drawn = [point for curve in curves for point in curve.drawn]
    x_low, x_high = _span([x for x, _ in drawn])
    xs = ticks(x_low, x_high, most=width // 90, whole=True)
    ys = ticks(*_span([y for _, y in drawn] + [0.0] * from_zero), most=height // 45, outward=True)
    frame = _Frame(x_low, x_high, ys[0], ys[-1], size)
    names = [("", unit), *((c.kind, c.name) for c in curves if len(curves) > 1)]
    body = _axes(frame, xs, ys) + _legend(names) + "".join(_line(curve, frame) for curve in curves)
    return _svg(size, f"{title}. {'; '.join(_label(curve) for curve in curves)}", body)


def smooth(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Means over a window centred on each point, and the number of points in the window.

    The window is a twentieth of the curve; values that are not finite are skipped.
    """
    reach = len(points) // 40
    means = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - reach) : i + reach + 1] if is_drawable(y)]
        if window:
            means.append((x, sum(window) / len(window)))
    return means, 2 * reach + 1


def is_drawable(value: Any) -> bool:
    """A finite number of at most 1e30."""
    return isinstance(value, int | float) and abs(value) < 1e30


def ticks(
    low: float, high: float, most: int, *, whole: bool = False, outward: bool = False
) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `most` of them, from `low` to `high`.

    whole: whole numbers only. outward: the first is at or below `low`, the last at or above `high`.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (power, 2 * power, 5 * power, 10 * power)
    step = next(step for step in steps if (high - low) / step <= most + _ROUNDING)
    step = max(1.0, step) if whole else step
    if outward:
        first, last = math.floor(low / step + _ROUNDING), math.ceil(high / step - _ROUNDING)
    else:
        first, last = math.ceil(low / step - _ROUNDING), math.floor(high / step + _ROUNDING)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of an axis with one common exponent and as few decimals as keep them distinct."""
    most = max((abs(value) for value in values), default=0.0)
    exponent = math.floor(math.log10(most)) if most and not 1e-2 <= most < 1e6 else 0
    scaled = [value / 10.0**exponent for value in values]
    gap = min((b - a for a, b in pairwise(scaled)), default=1.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    power = f"e{exponent}" if exponent else ""
    return [f"{v:,.{decimals}f}{power}" if v else "0" for v in scaled]


# -- drawing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixel coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    size: tuple[int, int]

    def x(self, value: float) -> float:
        width = self.size[0] - _LEFT - _RIGHT
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * width

    def y(self, value: float) -> float:
        height = self.size[1] - _TOP - _BOTTOM
        return _TOP + (self.y_high - value) / (self.y_high - self.y_low) * height


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, widened if they are equal."""
    low, high = min(values), max(values)
    if high - low > max(1e-6 * abs(high), 1e-30):
        return low, high
    return low - abs(low) / 10, high + (abs(high) / 10 or 1.0)


def _axes(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    width, height = frame.size
    bottom, right = height - _BOTTOM, width - _RIGHT
    parts = [f'<text x="{_LEFT - 10}" y="{bottom + 17}" text-anchor="end">step</text>']
    for value, label in zip(ys, tick_labels(ys), strict=True):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in zip(xs, tick_labels(xs), strict=True):
        x = frame.x(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _legend(names: Sequence[tuple[str, str]]) -> str:
    """Names in a row, each after a sample of its line; names without a kind are plain text."""
    parts, x = [], float(_LEFT)
    for kind, name in names:
        if kind:
            parts.append(f'<path class="{kind}" d="M{x:g} 8h18"/>')
            x += 23
        parts.append(f'<text x="{x:g}" y="12">{html.escape(name)}</text>')
        x += 6.2 * len(name) + 16 * bool(name)
    return "".join(parts)


def _line(curve: Curve, frame: _Frame) -> str:
    places, pen = [], "M"
    for x, y in curve.points:
        if is_drawable(y):
            # the zero-length stroke after a move shows a point without neighbours
            places.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}{'h0' if pen == 'M' else ''}")
            pen = "L"
        else:
            pen = "M"
    num_dots = len(curve.drawn)
    dotted = num_dots == 1 or (curve.dots and num_dots <= _MOST_DOTS)
    dots = (
        f'<circle class="{curve.kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">'
        f"<title>step {x:,}: {y:.4g}</title></circle>"
        for x, y in (curve.drawn if dotted else ())
    )
    return f'<path class="{curve.kind}" d="{"".join(places)}"/>{"".join(dots)}'


def _label(curve: Curve) -> str:
    """A curve in words, for screen readers."""
    (first, begin), (last, end) = curve.drawn[0], curve.drawn[-1]
    return f"{curve.name}: {begin:.4g} at step {first:,}, {end:.4g} at step {last:,}"


def _svg(size: tuple[int, int], label: str, body: str) -> str:
    width, height = size
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(label)}">{body}</svg>'
    )
