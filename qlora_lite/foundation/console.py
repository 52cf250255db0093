"""The consoles that the commands print to. Library functions print nothing."""

from collections.abc import Sequence

from rich.console import Console


class Terminal(Console):
    """Raises BrokenPipeError when stdout is closed, where rich itself would exit."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = Terminal(highlight=False, soft_wrap=False)
errors = Terminal(stderr=True, highlight=False)

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The values as a line of at most `width` bars, each the mean of an equal share of them."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in _parts(values, size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _parts(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
