"""What adapters learned, layer by layer, as plain values: ranks, spectra, norms, and phi.

    inspection = inspect(["runs/a", "runs/b"], i=4, j=16)
    inspection.as_values()                       # for JSON
    write_figures(inspection, Path("figures"))

Layers are read one at a time and side by side: beside the adapters themselves, memory holds one
weight of each target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from torch import Tensor

from qlora_lite.adapters.files import NATIVE
from qlora_lite.adapters.peft import CONFIG
from qlora_lite.analysis import figures
from qlora_lite.analysis.findings import (
    Amplification,
    Comparison,
    Grid,
    Inspection,
    LayerRow,
    PhiRow,
    TargetReport,
)
from qlora_lite.analysis.loralib import SUFFIXES
from qlora_lite.analysis.norms import delta_norm, relative_norm, weight_norm
from qlora_lite.analysis.rank import SVD, effective_rank, kept_rank
from qlora_lite.analysis.subspace import (
    amplification,
    left_directions,
    phi_grid,
    projected_norm,
    projected_norm_by_chance,
    right_directions,
    top_norm,
)
from qlora_lite.export.directory import require_free
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.files import complete_directory
from qlora_lite.foundation.watch import Watcher
from qlora_lite.inspection.deltas import Delta, Deltas, open_run
from qlora_lite.inspection.foreign_adapters import open_loralib, open_peft

MOST_DIRECTIONS = 64
"""Of phi, unless more are asked for: a map of a larger rank is no better to read."""


def inspect(
    targets: Sequence[str | Path],
    *,
    base: str | None = None,
    alpha: float | None = None,
    top: int | None = None,
    i: int | None = None,
    j: int | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
) -> Inspection:
    """Look at runs, PEFT adapters and loralib checkpoints, and compare every two of them.

    Args:
        base: model directory or hub id, for adapters that are not runs.
        alpha: of loralib checkpoints, which do not record it.
        top: how many of a delta's directions amplification looks at; all that it has unless given.
        i: directions of the first of two targets that phi is wanted for; so many there must be.
        j: of the second; as many as `i` unless given.

    Raises:
        QloraLiteError: if a target is none of the three, is damaged or does not fit its base, two
            of them have different bases or no layer in common, or `i` or `j` is too large.
    """
    watcher = watcher or Watcher()
    if (i or j) and len(targets) < 2:
        raise AdapterError(
            f"got i={i}, j={j} and one target. They are directions of phi, which compares two: "
            "give a second run or adapter"
        )
    opened = [open_deltas(str(target), base, alpha, device) for target in targets]
    for deltas in opened:
        for note in deltas.notes:
            watcher.note(f"{deltas.target}: {note}")
    pairs = list(combinations(range(len(opened)), 2))
    for first, second in pairs:
        _require_comparable(opened[first], opened[second], watcher)
    rows: list[list[LayerRow]] = [[] for _ in opened]
    phi_rows: dict[tuple[int, int], list[PhiRow]] = {pair: [] for pair in pairs}
    progress = _Progress(opened, watcher)
    for path in dict.fromkeys(path for deltas in opened for path in deltas.shapes):
        seen = {n: _Seen.of(d, path) for n, d in enumerate(opened) if path in d.shapes}
        for n, layer in seen.items():
            rows[n].append(_layer_row(layer, path, opened[n].is_scaled, top))
            progress.move(opened[n], path)
        for first, second in pairs:
            if first in seen and second in seen:
                row = _phi_row(path, seen[first], seen[second], i or j, j or i)
                phi_rows[first, second].append(row)
    return Inspection(
        tuple(_target_report(d, r) for d, r in zip(opened, rows, strict=True)),
        tuple(Comparison(*pair, tuple(found)) for pair, found in phi_rows.items()),
    )


def open_deltas(target: str, base: str | None, alpha: float | None, device: str) -> Deltas:
    """A run, a PEFT adapter directory or a loralib checkpoint, by what lies there."""
    path, rule = Path(target), devices.choose(device)
    if (path / "recipe.json").is_file():
        return open_run(target, rule, _without_effect(base=base, alpha=alpha))
    if (path / CONFIG).is_file() or (path / NATIVE).is_file():
        return open_peft(target, base, rule, _without_effect(alpha=alpha))
    if path.is_file() and path.suffix in SUFFIXES:
        return open_loralib(target, base, alpha, rule)
    raise AdapterError(
        f"{target} is neither a run (a folder with recipe.json), nor a PEFT adapter (a directory "
        f"with {CONFIG}), nor a loralib checkpoint (a file {', '.join(SUFFIXES)}). Give one of them"
    )


def _without_effect(**options: object) -> list[str]:
    """Notes on options whose answer this kind of target records itself."""
    return [
        f"it records its own {name}: --{name} has no effect"
        for name, value in options.items()
        if value is not None
    ]


def _require_comparable(first: Deltas, second: Deltas, watcher: Watcher) -> None:
    """phi means something between adapters of one base only.

    Raises:
        AdapterError: if the bases differ, or no layer is in both.
    """
    if first.base.is_other_than(second.base):
        raise AdapterError(
            f"{first.target} belongs to the base {first.base.name}, {second.target} to "
            f"{second.base.name}: phi compares adapters of one base. Inspect them one by one; if "
            "both names mean the same model, give it with --base"
        )
    common = [path for path in first.shapes if path in second.shapes]
    if not common:
        raise AdapterError(
            f"{first.target} and {second.target} adapt no layer in common (such as "
            f"{next(iter(first.shapes))} and {next(iter(second.shapes))}). Inspect them one by one"
        )
    for path in common:
        if first.shapes[path] != second.shapes[path]:
            raise AdapterError(
                f"{path} is {first.shapes[path]} in {first.target} and {second.shapes[path]} in "
                f"{second.target}: they belong to different bases. Inspect them one by one"
            )
    if alone := len(first.shapes.keys() ^ second.shapes.keys()):
        watcher.note(f"no phi of layers that only {first.target} or {second.target} has: {alone}")


class _Progress:
    """Bytes of the bases that have been read."""

    def __init__(self, opened: Sequence[Deltas], watcher: Watcher) -> None:
        self.total = sum(d.num_bytes(path) for d in opened for path in d.shapes)
        self.done = 0
        self.watcher = watcher

    def move(self, deltas: Deltas, path: str) -> None:
        self.done += deltas.num_bytes(path)
        if self.total:
            self.watcher.loading(self.done, self.total)


@dataclass(frozen=True)
class _Seen:
    """One layer of one target in memory."""

    target: str
    delta: Delta
    svd: SVD
    kept: int

    @classmethod
    def of(cls, deltas: Deltas, path: str) -> "_Seen":
        delta = deltas.read(path)
        svd = delta.svd()
        return cls(deltas.target, delta, svd, kept_rank(svd.values, delta.shape))

    @property
    def num_directions(self) -> int:
        """All that a pair has. A dense delta has those of the weight, down to the last rounding:
        as many as the rank that the layer was given count."""
        return self.kept if self.delta.dense is None else min(self.delta.rank, self.kept)


def _target_report(deltas: Deltas, rows: Sequence[LayerRow]) -> TargetReport:
    return TargetReport(
        target=deltas.target,
        what=deltas.what,
        base=deltas.base.name,
        is_scaled=deltas.is_scaled,
        notes=tuple(deltas.notes),
        layers=tuple(rows),
    )


def _layer_row(seen: _Seen, path: str, is_scaled: bool, top: int | None) -> LayerRow:
    delta, values, weight = seen.delta, seen.svd.values, seen.delta.weight
    if not is_scaled and seen.kept:
        values = values / values.max()
    whole = share = None
    if weight is not None:
        whole = weight_norm(weight)
        share = relative_norm(values, weight) if is_scaled and whole else None
    return LayerRow(
        path=path,
        shape=delta.shape,
        rank=delta.rank,
        kept_rank=seen.kept,
        effective_rank=effective_rank(values),
        singular_values=_digits(values),
        norm=delta_norm(values) if is_scaled else None,
        weight_norm=whole,
        relative_norm=share,
        amplification=_amplification(seen, is_scaled, top),
        gates=None if delta.gates is None else _digits(delta.gates),
    )


def _amplification(seen: _Seen, is_scaled: bool, top: int | None) -> Amplification | None:
    """None without a weight, or where the delta is zero and has no directions."""
    rank = min(top or seen.num_directions, seen.kept)
    weight, svd = seen.delta.weight, seen.svd
    if weight is None or rank == 0:
        return None
    left, right = svd.left[:, :rank], svd.right[:, :rank]
    there = projected_norm(weight, left, right)
    return Amplification(
        rank=rank,
        weight_there=there,
        weight_at_top=top_norm(weight, rank),
        weight_by_chance=projected_norm_by_chance(weight_norm(weight), rank, seen.delta.shape),
        factor=amplification(svd.values, left, right, weight) if is_scaled and there else None,
    )


def _phi_row(path: str, first: _Seen, second: _Seen, i: int | None, j: int | None) -> PhiRow:
    are_pairs = first.delta.is_pair_trained and second.delta.is_pair_trained
    right_1, left_1 = _directions(first, path, are_pairs, i)
    right_2, left_2 = _directions(second, path, are_pairs, j)
    return PhiRow(
        path=path,
        shape=first.delta.shape,
        of="factors" if are_pairs else "delta",
        right=_grid(right_1, right_2),
        left=_grid(left_1, left_2),
    )


def _directions(seen: _Seen, path: str, of_pair: bool, wanted: int | None) -> tuple[Tensor, Tensor]:
    """Right and left ones, strongest first: those that count, and as many more as are wanted.

    Raises:
        AdapterError: if there are fewer than that.
    """
    delta, svd = seen.delta, seen.svd
    if of_pair:
        assert delta.pair is not None
        right, left = right_directions(delta.pair.down), left_directions(delta.pair.up)
    else:
        right, left = svd.right[:, : seen.kept], svd.left[:, : seen.kept]
    there = min(right.shape[1], left.shape[1])
    if wanted is not None and wanted > there:
        raise AdapterError(
            f"got {wanted} directions of {seen.target} for phi, and its {path} has {there}. "
            "Take -i and -j no larger than that, or leave them out"
        )
    most = max(min(seen.num_directions, MOST_DIRECTIONS), wanted or 0)
    return right[:, :most], left[:, :most]


def _grid(first: Tensor, second: Tensor) -> Grid:
    return tuple(_digits(row) for row in phi_grid(first, second.to(first.device)))


def _digits(values: Tensor) -> tuple[float, ...]:
    """As numbers of six digits, for files of a readable size."""
    return tuple(float(f"{value:.6g}") for value in values.tolist())


def write_figures(inspection: Inspection, directory: Path) -> None:
    """PNG files into a new directory, which appears when all are written.

    Raises:
        ExportError: if the directory is taken, or matplotlib is not installed.
    """
    figures.require_matplotlib()
    require_free(directory)
    with complete_directory(directory) as aside:
        figures.draw(inspection, aside)
