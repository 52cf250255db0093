"""Inspect adapters layer by layer: ranks, spectra, norms and phi, as plain values.

    inspection = inspect(["runs/a", "runs/b"], i=4, j=16)
    inspection.to_dict()                         # for JSON
    write_figures(inspection, Path("figures"))

The same layer of all targets is read before the next one: memory holds the adapters and one weight
per target.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from qlora_lite.adapters.files import NATIVE
from qlora_lite.adapters.peft_config import CONFIG
from qlora_lite.analysis import figures
from qlora_lite.analysis.findings import (
    Comparison,
    Inspection,
    LayerRow,
    PhiRow,
    TargetReport,
)
from qlora_lite.analysis.loralib import SUFFIXES
from qlora_lite.export.directory import find_finished, require_free, write_record
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.files import complete_directory
from qlora_lite.foundation.sealed import digest_of
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.inspection.deltas import Deltas, open_run
from qlora_lite.inspection.foreign_adapters import open_loralib, open_peft
from qlora_lite.inspection.layers import LoadedLayer, layer_row, phi_row


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
    trust_remote_code: bool = False,
) -> Inspection:
    """Inspect runs, PEFT adapters and loralib checkpoints, and compare each pair of them.

    Args:
        base: model directory or hub id of adapters that are not runs.
        alpha: LoRA alpha of loralib checkpoints, which do not record it.
        top: number of directions of a delta used for amplification; default: all.
        i: number of directions of the first of two targets in phi(i, j).
        j: the same for the second; default: as `i`.
        trust_remote_code: let the bases of runs, and `base`, run their own Python code.

    Raises:
        QloraLiteError: if a target is none of the three, is damaged or does not fit its base, two
            of them have different bases or no layer in common, or `i` or `j` is too large.
    """
    watcher = watcher or Watcher()
    if (i or j) and len(targets) < 2:
        raise AdapterError(
            f"got i={i}, j={j} and one target, but phi compares two targets: give a second run or "
            "adapter"
        )
    opened = [
        open_deltas(str(target), base, alpha, device, trust_remote_code) for target in targets
    ]
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
        loaded = {n: LoadedLayer.read(d, path) for n, d in enumerate(opened) if path in d.shapes}
        for n, layer in loaded.items():
            rows[n].append(layer_row(layer, path, opened[n].is_scaled, top))
            progress.move(opened[n], path)
        for first, second in pairs:
            if first in loaded and second in loaded:
                row = phi_row(path, loaded[first], loaded[second], i or j, j or i)
                phi_rows[first, second].append(row)
    return Inspection(
        tuple(_target_report(d, r) for d, r in zip(opened, rows, strict=True)),
        tuple(Comparison(*pair, tuple(found)) for pair, found in phi_rows.items()),
    )


def open_deltas(
    target: str,
    base: str | None,
    alpha: float | None,
    device: str,
    trust_remote_code: bool = False,
) -> Deltas:
    """Open a run, a PEFT adapter directory or a loralib checkpoint, depending on its files."""
    path, rule = Path(target), devices.choose(device)
    if (path / "recipe.json").is_file():
        return open_run(target, rule, _without_effect(base=base, alpha=alpha), trust_remote_code)
    if (path / CONFIG).is_file() or (path / NATIVE).is_file():
        return open_peft(target, base, rule, _without_effect(alpha=alpha), trust_remote_code)
    if path.is_file() and path.suffix in SUFFIXES:
        return open_loralib(target, base, alpha, rule, trust_remote_code)
    raise AdapterError(
        f"{target} is neither a run (a folder with recipe.json), nor a PEFT adapter (a directory "
        f"with {CONFIG}), nor a loralib checkpoint (a file {', '.join(SUFFIXES)}). Give one of them"
    )


def _without_effect(**options: object) -> list[str]:
    """Notes on options that this kind of target records itself."""
    return [
        f"its own {name} is recorded: --{name} has no effect"
        for name, value in options.items()
        if value is not None
    ]


def _require_comparable(first: Deltas, second: Deltas, watcher: Watcher) -> None:
    """phi is only defined for adapters of the same base.

    Raises:
        AdapterError: if the bases differ, or the targets have no layer in common.
    """
    if first.base.differs_from(second.base):
        raise AdapterError(
            f"{first.target} has the base {first.base.name}, {second.target} has "
            f"{second.base.name}, but phi needs adapters of the same base. Inspect them one by "
            "one, or if both names mean the same model, give it with --base"
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
                f"{second.target}: they have different bases. Inspect them one by one"
            )
    if alone := len(first.shapes.keys() ^ second.shapes.keys()):
        watcher.note(f"no phi for {alone} layers that only {first.target} or {second.target} has")


class _Progress:
    """Reports how many bytes of the bases are read."""

    def __init__(self, opened: Sequence[Deltas], watcher: Watcher) -> None:
        self.total = sum(d.num_bytes(path) for d in opened for path in d.shapes)
        self.done = 0
        self.watcher = watcher

    def move(self, deltas: Deltas, path: str) -> None:
        self.done += deltas.num_bytes(path)
        if self.total:
            self.watcher.loading(self.done, self.total)


def _target_report(deltas: Deltas, rows: Sequence[LayerRow]) -> TargetReport:
    return TargetReport(
        target=deltas.target,
        what=deltas.what,
        base=deltas.base.name,
        is_scaled=deltas.is_scaled,
        notes=tuple(deltas.notes),
        layers=tuple(rows),
    )


def write_figures(inspection: Inspection, directory: Path) -> None:
    """Write PNG files into a new directory, which appears when all are written.

    If the directory is what the same call wrote before, nothing is written.

    Raises:
        ExportError: if the directory exists, or matplotlib is not installed.
    """
    figures.require_matplotlib()
    request = digest_of(inspection.to_dict())
    if find_finished(directory, request) is not None:
        return
    require_free(directory)
    with complete_directory(directory) as temporary:
        figures.draw(inspection, temporary)
        write_record(temporary, request, request, {}, {})
