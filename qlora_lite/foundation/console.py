"""The consoles that the commands print to. Library functions print nothing.

Rows, names of files and answers of a model may contain control characters, which a terminal obeys:
`visible` shows them instead. Everything that is printed passes through it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters except tab and line feed, and marks that reverse the direction of text."""


def visible(text: str) -> str:
    r"""The text with control characters as escapes: ESC as `\x1b`. Tabs and line feeds stay."""
    return _CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Terminal(Console):
    """Prints control characters in texts as escapes, and raises BrokenPipeError when stdout is
    closed, where rich itself would exit."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield Segment(visible(text), style) if control is None else segment

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = Terminal(highlight=False, soft_wrap=False, emoji=False)
errors = Terminal(stderr=True, highlight=False, emoji=False)

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
