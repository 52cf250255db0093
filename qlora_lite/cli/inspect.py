"""The command `inspect`: what adapters learned, as tables, JSON and figures."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from qlora_lite.cli.display import Display
from qlora_lite.cli.tables import show
from qlora_lite.cli.trust import split_trust
from qlora_lite.foundation.console import console
from qlora_lite.foundation.errors import ExportError

if TYPE_CHECKING:
    from qlora_lite.analysis.findings import Comparison, Grid, Inspection, LayerRow, PhiRow

SHOWN_VALUES = 4
"""Singular values shown per layer; JSON and figures have all."""
SOME_DIRECTIONS = 4
"""phi is shown for 1, for this many and for all directions."""
NARROWEST_NAME = 18
"""Minimum width of the layer names on a narrow terminal."""


def inspect(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|ADAPTER...",
            help="Runs, PEFT adapter directories or loralib checkpoints (.pt, .bin); "
            "each pair of them is compared. base.trust_remote_code=true lets a base run its own "
            "code.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base of adapters that are not runs: a directory, a GGUF file or a hub id."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(min=0, help="LoRA alpha of a loralib checkpoint, which does not record it."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Directions of the delta used for amplification; default: all."),
    ] = None,
    i: Annotated[
        int | None, typer.Option("-i", min=1, help="Directions of the first target in phi(i, j).")
    ] = None,
    j: Annotated[
        int | None,
        typer.Option("-j", min=1, help="Directions of the second target; default: as -i."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything as JSON.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw PNG files (needs matplotlib).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Show what was learned: ranks, spectra, norms, amplification, and shared subspaces (phi)."""
    from qlora_lite.analysis.figures import require_matplotlib
    from qlora_lite.export.directory import RECORD, require_free
    from qlora_lite.foundation.files import as_stored, make_folder, read_object, write_json
    from qlora_lite.inspection import inspect as inspecting

    targets, is_trusted = split_trust(targets)
    if json is not None and os.path.lexists(json) and _targets_in(json) != targets:
        raise _exists(json)
    if json is not None:
        make_folder(json.parent)
    if figures is not None:
        require_matplotlib()
        if not (figures / RECORD).is_file():  # else it may be what this command wrote before
            require_free(figures)
    with Display() as display:
        inspection = inspecting.inspect(
            targets,
            base=base,
            alpha=alpha,
            top=top,
            i=i,
            j=j,
            device=device,
            watcher=display,
            trust_remote_code=is_trusted,
        )
        _show(display, inspection, i or j, j or i)
        if json is not None:
            if json.exists() and read_object(json) != as_stored(inspection.to_dict()):
                raise _exists(json)
            write_json(json, inspection.to_dict())
            display.print_line(f"JSON: {json}")
        if figures is not None:
            inspecting.write_figures(inspection, figures)
            display.print_line(f"figures: {figures}")


def _exists(file: Path) -> ExportError:
    return ExportError(f"{file} exists already and is not overwritten. Give another --json FILE")


def _targets_in(file: Path) -> list[str] | None:
    """The targets of an earlier call that wrote this file; None if it is another file."""
    from qlora_lite.foundation.files import read_object

    try:
        return [report["target"] for report in read_object(file, "targets")["targets"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _show(display: Display, inspection: "Inspection", i: int | None, j: int | None) -> None:
    for report in inspection.targets:
        base = f", base {report.base}" if report.base else ""
        display.print_line(f"{report.target}: {report.what}{base}", style="bold")
        show(console, layer_table(report.layers, report.is_scaled))
        if any(row.amplification for row in report.layers):
            display.print_line(
                "||U'WV|| of the weight W for the top directions U, V of its delta dW, of W itself "
                "and for random ones; amplified: ||dW|| / the first (Hu et al. 2021, table 4)"
            )
            show(console, amplification_table(report.layers))
    for comparison in inspection.comparisons:
        first, second = (
            inspection.targets[n].target for n in (comparison.first, comparison.second)
        )
        display.print_line(f"phi of {first} (i) and {second} (j)", style="bold")
        display.print_line(
            f"singular directions of {_directions_of(comparison)}; i = j in columns with one number"
        )
        show(console, phi_table(comparison.layers, i, j))


def layer_table(rows: Sequence["LayerRow"], is_scaled: bool) -> Table:
    """One line per layer; columns that are empty for all layers are left out."""
    columns = {
        ">rank": [str(row.rank) for row in rows],
        ">kept": [str(row.kept_rank) for row in rows],
        ">effective": [f"{row.effective_rank:.2f}" for row in rows],
        ">gates open": [_gates(row.gates) for row in rows],
        ">||dW||": [_number(row.norm) for row in rows],
        ">of ||W||": [_share(row.relative_norm) for row in rows],
        "singular values" + " / largest" * (not is_scaled): [_top_values(row) for row in rows],
    }
    known = {name: cells for name, cells in columns.items() if any(cells)}
    return _table(_path_column([row.path for row in rows]) | known)


def amplification_table(rows: Sequence["LayerRow"]) -> Table:
    """One line per layer whose weight is known, as table 4 of the paper."""
    found = {row.path: row.amplification for row in rows if row.amplification}
    columns = {
        ">directions": [str(each.rank) for each in found.values()],
        ">of dW": [_number(each.weight_there) for each in found.values()],
        ">of W": [_number(each.weight_at_top) for each in found.values()],
        ">random": [_number(each.weight_by_chance) for each in found.values()],
        ">amplified": [_number(each.factor) for each in found.values()],
    }
    return _table(_path_column(list(found)) | columns)


def phi_table(rows: Sequence["PhiRow"], i: int | None, j: int | None) -> Table:
    """One line per layer and a line of means. Columns for each side: phi(i, j) if these are given,
    else for one, some and all directions; then what chance would give for the last of them."""
    from qlora_lite.analysis.subspace import phi_by_chance

    cells: dict[str, list[float | None]] = {}
    for row in rows:
        for side, grid, d in (("right", row.right, row.shape[1]), ("left", row.left, row.shape[0])):
            sizes = _sizes(grid, i, j)
            for name, size in sizes.items():
                cells.setdefault(f">{side} {name}", []).append(_phi(grid, size))
            last = [*sizes.values()][-1]
            by_chance = None if last is None else phi_by_chance(*last, d)
            cells.setdefault(f">{side} chance", []).append(by_chance)
    columns = _path_column([row.path for row in rows], "mean")
    for name, values in cells.items():
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        columns[name] = ["" if value is None else f"{value:.3f}" for value in (*values, mean)]
    return _table(columns)


def _sizes(grid: "Grid", i: int | None, j: int | None) -> dict[str, tuple[int, int] | None]:
    """The shown cells of a grid by their headings; None where the grid is too small."""
    there = (len(grid), len(grid[0]) if grid else 0)
    if i is not None and j is not None:
        wanted = {f"({i},{j})": (i, j)}
    else:
        wanted = {"1": (1, 1), f"{SOME_DIRECTIONS}": (SOME_DIRECTIONS,) * 2, "all": there}
    return {
        name: size if 0 < size[0] <= there[0] and 0 < size[1] <= there[1] else None
        for name, size in wanted.items()
    }


def _phi(grid: "Grid", size: tuple[int, int] | None) -> float | None:
    return None if size is None else grid[size[0] - 1][size[1] - 1]


def _directions_of(comparison: "Comparison") -> str:
    kinds = {row.of for row in comparison.layers}
    if kinds == {"factors"}:
        return "the factors: right ones of A, left ones of B"
    if kinds == {"delta"}:
        return "the deltas, right and left"
    return "the factors (right ones of A, left ones of B), or of the delta if there are no factors"


def _path_column(paths: Sequence[str], *below: str) -> dict[str, list[str]]:
    """The column of layer paths without their common prefix, which is its heading."""
    parents = [path.split(".")[:-1] for path in paths]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    shared = "".join(f"{parts[0]}." for parts in same)
    return {shared or "layer": [*(path.removeprefix(shared) for path in paths), *below]}


def _top_values(row: "LayerRow") -> str:
    values = row.singular_values
    shown = " ".join(f"{value:.3g}" for value in values[:SHOWN_VALUES])
    return shown + (" ..." if len(values) > SHOWN_VALUES else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _gates(gates: Sequence[float] | None) -> str:
    return "" if gates is None else f"{sum(gate != 0 for gate in gates)}/{len(gates)}"


def _table(columns: dict[str, list[str]]) -> Table:
    """A table of text columns and, under headings that start with >, numbers. Numbers are not
    wrapped; their headings break at spaces, so that the table fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        is_number = name.startswith(">")
        table.add_column(
            Text(name.removeprefix(">").replace(" ", "\n") if is_number else name),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            min_width=NARROWEST_NAME if number == 0 else None,
            overflow="fold",
        )
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    return table
