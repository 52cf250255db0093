"""The results of an inspection as PNG files: spectra, values over depth, maps of phi.

| file                  | shows                                                                    |
|-----------------------|--------------------------------------------------------------------------|
| spectra-N.png         | the singular values of target N's deltas                                 |
| layers-N.png          | its ranks, relative norms and amplification over depth                   |
| phi-N-M-SIDE-NAME.png | phi(i, j) of targets N and M in all layers with a name; as figure 3 of   |
|                       | Hu et al. 2021                                                           |

Needs matplotlib (extra `[figures]`); works without a display and does not use pyplot.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lite.analysis.findings import Comparison, Grid, Inspection, LayerRow, TargetReport
from qlora_lite.foundation.errors import ExportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS, MAPS = 4, 8
"""Panels and phi maps per row."""
DOTS_PER_INCH = 110


def require_matplotlib() -> None:
    """Check this before the work.

    Raises:
        ExportError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "figures need matplotlib, which is not installed. Run: pip install matplotlib"
        ) from error


def draw(inspection: Inspection, directory: Path) -> None:
    """Write all figures to an existing directory."""
    for number, report in enumerate(inspection.targets, 1):
        _draw_spectra(directory / f"spectra-{number}.png", report)
        _draw_depth(directory / f"layers-{number}.png", report)
    for comparison in inspection.comparisons:
        first, second = (
            inspection.targets[n].target for n in (comparison.first, comparison.second)
        )
        _draw_phi(directory, comparison, f"{first} (i) and {second} (j)")


def _draw_spectra(file: Path, report: TargetReport) -> None:
    """One panel per layer name, one curve per layer; deeper layers are lighter."""
    # only the values above rounding: the axis is logarithmic
    spectra = {row.path: row.singular_values[: row.kept_rank] for row in report.layers}
    names = by_name(spectra)
    title = f"singular values of the deltas of {report.target}"
    figure, panels = _panels(title, len(names), PANELS, (3.4, 2.6))
    for panel, (name, paths) in zip(panels, names.items(), strict=True):
        for path, shade in zip(paths, _shades(len(paths)), strict=True):
            numbers = range(1, len(spectra[path]) + 1)
            panel.plot(numbers, spectra[path], color=shade, linewidth=1, marker=".")
        panel.set(title=name, yscale="log", xlabel="number")
        panel.set_ylabel("singular value" if report.is_scaled else "singular value / largest")
    _save(figure, file)


def _draw_depth(file: Path, report: TargetReport) -> None:
    """One panel per quantity, one curve per layer name."""
    quantities = _quantities(report.layers)
    colours = {n: f"C{i % 10}" for i, n in enumerate(by_name(row.path for row in report.layers))}
    figure, panels = _panels(report.target, len(quantities), PANELS, (4.2, 3.0))
    for panel, (quantity, values) in zip(panels, quantities.items(), strict=True):
        for name, paths in by_name(values).items():
            depths = [depth(path, place) for place, path in enumerate(paths)]
            heights = [values[path] for path in paths]
            panel.plot(depths, heights, label=name, color=colours[name], linewidth=1, marker=".")
        panel.set(title=quantity, xlabel="block")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=6)
    _save(figure, file)


def _quantities(rows: Iterable[LayerRow]) -> dict[str, dict[str, float]]:
    """Known values by quantity and layer path."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        known = {
            "effective rank": row.effective_rank,
            "kept rank": row.kept_rank,
            "norm of the delta / norm of the weight": row.relative_norm,
            "amplification": None if row.amplification is None else row.amplification.factor,
        }
        for name, value in known.items():
            if value is not None:
                found.setdefault(name, {})[row.path] = value
    return found


def _draw_phi(directory: Path, comparison: Comparison, targets: str) -> None:
    """One file per side and layer name, with one map per layer."""
    rows = {row.path: row for row in comparison.layers}
    for name, paths in by_name(rows).items():
        sides = {
            "right": {path: rows[path].right for path in paths},
            "left": {path: rows[path].left for path in paths},
        }
        for side, grids in sides.items():
            drawn = {path: grid for path, grid in grids.items() if grid and grid[0]}
            if drawn:
                numbers = f"{comparison.first + 1}-{comparison.second + 1}"
                slug = re.sub(r"[^\w.-]+", "_", name)
                file = directory / f"phi-{numbers}-{side}-{slug}.png"
                _draw_maps(file, f"phi of the {side} directions of {targets}", drawn)


def _draw_maps(file: Path, title: str, grids: Mapping[str, Grid]) -> None:
    """phi as images: i downwards, j to the right."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = _panels(title, len(grids), MAPS, (2.4, 2.2))
    for panel, (path, grid) in zip(panels, grids.items(), strict=True):
        extent = (0.5, len(grid[0]) + 0.5, len(grid) + 0.5, 0.5)
        image = panel.imshow(grid, vmin=0, vmax=1, extent=extent, aspect="auto", cmap="viridis")
        panel.set(xlabel="j", ylabel="i")
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(path, fontsize=5)
    figure.colorbar(image, ax=panels, label="phi(i, j)")
    _save(figure, file)


def by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths grouped by their last part, in their order."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(path.rpartition(".")[2], []).append(path)
    return names


def depth(path: str, otherwise: int) -> int:
    """Block number of a layer, the first number in its path."""
    numbers = re.findall(r"(?:^|\.)(\d+)\.", path)
    return int(numbers[0]) if numbers else otherwise


def _panels(
    title: str, count: int, columns: int, inches: tuple[float, float]
) -> tuple["Figure", list["Axes"]]:
    """A figure with `count` panels, at most `columns` per row; `inches` is the panel size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(inches[0] * columns, 5.0), inches[1] * rows + 0.5)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _shades(count: int) -> list[tuple[float, float, float, float]]:
    """One colour per layer, from the first to the last."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(count - 1, 1)) for i in range(count)]


def _save(figure: "Figure", file: Path) -> None:
    """A figure without pyplot uses the Agg backend, whatever MPLBACKEND is."""
    figure.savefig(file, format="png")
