"""The figures of the study: first steps, loss against parameters, DyLoRA against rank."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from method_study.contenders import RANK, at_rank
from method_study.material import EMBEDDED
from method_study.readings import Missing, Readings, first_part, mean
from qlora_lite.foundation.errors import RecipeError

DATA = EMBEDDED.name
MARKERS = "os^vDP"
NAMES = ("first_steps", "parameters", "dylora")


def require_matplotlib() -> None:
    """Check this before hours of training.

    Raises:
        RecipeError: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError(
            "--write draws figures, and matplotlib is not installed. Run "
            "`pip install qlora-lite[figures]`, or leave out --write"
        )


def draw(readings: Readings, methods: Sequence[str], folder: Path) -> list[Path]:
    """Draw every figure that has its runs; return the files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    pictures: tuple[Callable[[Any], None], ...] = (
        lambda axes: first_steps(axes, readings),
        lambda axes: loss_against_parameters(axes, readings, methods),
        lambda axes: dylora_against_rank(axes, readings),
    )
    files = []
    for name, picture in zip(NAMES, pictures, strict=True):
        figure = Figure(figsize=(7, 4), layout="constrained")
        try:
            picture(figure.add_subplot())
        except Missing:
            continue
        files.append(folder / f"{name}.png")
        # without the version of matplotlib, equal data gives equal files
        figure.savefig(files[-1], dpi=120, metadata={"Software": None})
    return files


def drawn(folder: Path) -> list[Path]:
    """The figures that are in a folder."""
    files = [folder / f"{name}.png" for name in NAMES]
    return [file for file in files if file.exists()]


def first_steps(axes: Any, readings: Readings) -> None:
    """Training loss of the first quarter of the steps, mean over seeds."""
    for method in ("lora", "olora", "pissa"):
        curves = [first_part(run["losses"]) for run in readings.runs(method, DATA)]
        losses = [mean(seeds) for seeds in zip(*curves, strict=True)]
        axes.plot(range(1, len(losses) + 1), losses, marker=".", label=method)
    _label(axes, "first steps, embedded data", "step", "training loss")


def loss_against_parameters(axes: Any, readings: Readings, methods: Sequence[str]) -> None:
    """Held-out loss against trained parameters, the best first in the legend."""
    losses = {method: mean(readings.losses(method, DATA)) for method in methods}
    for number, method in enumerate(sorted(losses, key=losses.__getitem__)):
        trained = readings.runs(method, DATA)[0]["trained"]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(trained, losses[method], marker, color=f"C{number % 10}", label=method)
    axes.set_xscale("log")
    title = "held-out loss, embedded data"
    _label(axes, title, "trained parameters", "held-out loss", outside=True)


def dylora_against_rank(axes: Any, readings: Readings) -> None:
    """One DyLoRA run, one LoRA run truncated, and a LoRA run for every rank."""
    ranks = range(1, RANK + 1)
    for method, label in (("dylora", "one DyLoRA run"), ("lora", "one LoRA run, truncated")):
        losses = [mean(seeds) for seeds in zip(*readings.by_rank(method, DATA), strict=True)]
        axes.plot(ranks, losses, marker=".", label=label)
    separate = [mean(readings.losses(at_rank(rank), DATA)) for rank in ranks]
    axes.plot(ranks, separate, marker=".", label=f"{RANK} LoRA runs")
    _label(axes, "held-out loss by rank, embedded data", "rank", "held-out loss")


def _label(axes: Any, title: str, x: str, y: str, outside: bool = False) -> None:
    """Title, axis labels, grid and a legend, which may be outside of the axes."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if outside:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    else:
        axes.legend()
