"""Local files through `datasets`: streamed without its cache, and without its output."""

import glob
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK_ROWS = 1000
"""Rows that are fetched at a time."""


def stream_rows(builder: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of a local file, read by a builder of `datasets` such as "csv"."""
    import datasets

    with quiet_datasets():
        rows = datasets.load_dataset(
            builder, data_files=glob.escape(str(path)), split="train", streaming=True, **options
        )
        chunks = iter(rows.iter(CHUNK_ROWS))
    while True:
        with quiet_datasets():
            chunk = next(chunks, None)
        if chunk is None:
            return
        for values in zip(*chunk.values(), strict=True):
            yield dict(zip(chunk, values, strict=True))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines with their line ends. A byte-order mark is removed."""
    rows = stream_rows("text", path, encoding="utf-8-sig", keep_linebreaks=True)
    return enumerate((row["text"] for row in rows), start=1)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from logging, and from progress bars unless stderr is a terminal."""
    import datasets

    level = datasets.logging.get_verbosity()
    had_bars = datasets.are_progress_bars_disabled() is False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.logging.set_verbosity(level)
        if had_bars:
            datasets.enable_progress_bars()
