"""`datasets` without surprises: local files streamed past its cache, and nothing printed."""

import glob
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK = 1000
"""Rows that are fetched at a time."""


def stream(kind: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of a local file, read by the builder `kind` of `datasets`."""
    import datasets

    with quiet():
        rows = datasets.load_dataset(
            kind, data_files=glob.escape(str(path)), split="train", streaming=True, **options
        )
        chunks = iter(rows.iter(CHUNK))
    while True:
        with quiet():
            chunk = next(chunks, None)
        if chunk is None:
            return
        for values in zip(*chunk.values(), strict=True):
            yield dict(zip(chunk, values, strict=True))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines with their ends; a byte-order mark is left out."""
    rows = stream("text", path, encoding="utf-8-sig", keep_linebreaks=True)
    return enumerate((row["text"] for row in rows), start=1)


def whole(path: Path) -> str:
    """The text of a file in one piece."""
    return "".join(line for _, line in lines(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from logging and, where nobody watches, from drawing progress bars."""
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
