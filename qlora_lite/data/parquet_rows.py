"""Rows of parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import DataError

CHUNK_ROWS = 1000
"""Rows that are decoded at a time."""


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their number, from 1.

    Raises:
        DataError: if the file is damaged or not a parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with open(path, "rb") as start:  # pyarrow looks at the end only
            if start.read(4) != b"PAR1":
                raise ValueError("it does not start with PAR1")
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _require_different_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(CHUNK_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    # pyarrow decodes what the bytes claim: a wrong length, kind or date raises any of these
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        NotImplementedError,
        MemoryError,
    ) as error:
        after = f"after row {number} " if number else ""
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} {after}is not a parquet file, or is damaged or incomplete: {detail:.300}. "
            "Write or download it again"
        ) from None


def _require_different_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{path}: got the column names {names}. No name may occur twice")
