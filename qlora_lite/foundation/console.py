"""What the terminal shows. Library functions print nothing; the commands print through here."""

from collections.abc import Sequence

from rich.console import Console


class Terminal(Console):
    """A console whose reader may have seen enough: how a command ends is not decided here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = Terminal(highlight=False, soft_wrap=False)
errors = Terminal(stderr=True, highlight=False)

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last values as a line of bars, averaged down to at most `width` of them."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in _parts(values, size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _parts(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
