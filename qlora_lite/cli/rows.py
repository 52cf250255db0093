"""Print rows of data with every token, and which tokens are trained.

With colours, trained tokens are coloured and every second token is underlined. Without, trained
spans are put between [[ and ]], and token borders are not shown.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from qlora_lite.data.preview import LengthBar, Preview, PreviewRow
    from qlora_lite.data.token_display import Piece

LONGEST_TEXT = 2000
"""Characters shown of a row."""
_BAR_WIDTH = 40


def show_row(console: Console, row: "PreviewRow") -> None:
    """Print one row below its source and token counts."""
    head = f"{row.where}: {row.num_tokens:,} tokens, {row.num_trained:,} of them trained"
    console.print(head, style="bold", markup=False, soft_wrap=True)
    console.print(row_text(row.pieces, has_colour=console.color_system is not None), soft_wrap=True)


def row_text(pieces: Sequence["Piece"], has_colour: bool) -> Text:
    """The text of a row with its trained tokens marked, cut at `LONGEST_TEXT`."""
    from qlora_lite.data.token_display import bracketed, coloured

    text = coloured(pieces) if has_colour else Text(bracketed(pieces))
    if len(text) > LONGEST_TEXT:
        text.truncate(LONGEST_TEXT)
        text.append(" ...")
    return text


def show_preview(console: Console, preview: "Preview") -> None:
    """Print some rows, then statistics of all rows."""

    def print_line(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, soft_wrap=True)

    for row in preview.rows:
        show_row(console, row)
        console.print()
    print_line(
        f"{preview.num_train:,} rows to train on, {preview.num_heldout:,} held out; "
        f"{preview.train_tokens:,} tokens, {preview.trained_tokens:,} trained "
        f"({preview.trained_tokens / preview.train_tokens:.0%})"
    )
    print_line(f"{preview.template}; end of turn {preview.end_of_turn!r}")
    for name, stats in (("train", preview.stats), ("held out", preview.heldout_stats)):
        if stats is not None:
            print_line(_lengths_line(name, stats))
    for bar in _histogram(preview.lengths):
        print_line(bar)
    if preview.num_repeated:
        print_line(
            f"{preview.num_repeated:,} rows left out: the held-out file contains them", "yellow"
        )
    if preview.too_long:
        print_line(f"too long: {', '.join(preview.too_long)}", "yellow")
    for stats in (preview.stats, preview.heldout_stats):
        for line in [] if stats is None else odd_rows(stats):
            print_line(line, "yellow")
    if preview.stats.rewritten_turns:
        print_line(
            f"{preview.stats.rewritten_turns:,} assistant turns are changed by the chat template; "
            "the text that it writes is trained",
            "yellow",
        )


def odd_rows(stats: Any) -> list[str]:
    """Lines about rows that repeat others, and about blank records."""
    lines = []
    if stats.equal_rows:
        share = stats.equal_rows / stats.rows
        lines.append(
            f"{stats.equal_rows:,} of {stats.rows:,} rows ({share:.1%}) are equal to an earlier row"
        )
    if stats.blank_rows:
        lines.append(f"{stats.blank_rows:,} blank records are skipped")
    return lines


def _lengths_line(name: str, stats: Any) -> str:
    """Counts and token lengths of the rows of one source."""
    return (
        f"{name}: {stats.rows:,} rows read; tokens p50 {stats.p50}, p95 {stats.p95}, "
        f"max {stats.longest}; dropped {stats.dropped_rows:,}, split {stats.split_rows:,}, "
        f"cut {stats.truncated_rows:,} ({stats.lost_share:.2%} of the tokens lost)"
    )


def _histogram(bars: Sequence["LengthBar"]) -> list[str]:
    most = max(bar.count for bar in bars)
    return [
        f"{bar.shortest:>7} - {bar.longest:<7} {bar.count:>8,}  "
        + "#" * -(-bar.count * _BAR_WIDTH // most)
        for bar in bars
    ]
