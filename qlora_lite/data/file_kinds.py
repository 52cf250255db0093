"""Recognise files whose content is of another kind than their name says."""

from pathlib import Path

from qlora_lite.foundation.errors import DataError

MAGIC = (
    (b"\x1f\x8b", "gzip data", ".gz", "Unpack it with gunzip"),
    (b"BZh", "bzip2 data", ".bz2", "Unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "xz data", ".xz", "Unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstandard data", ".zst", "Unpack it with unzstd"),
    (b"PK\x03\x04", "a zip archive", ".zip", "Unpack it with unzip, or convert the spreadsheet"),
    (b"PAR1", "a parquet file", ".parquet", "Rename it to .parquet"),
    (b"ARROW1", "an Arrow file", ".arrow", "Convert it to .parquet"),
    (b"SQLite", "an SQLite database", ".sqlite", "Export its table to .jsonl or .parquet"),
)
"""First bytes of files that are not text: their kind, the suffix of that kind, and what to do."""


def require_kind(path: Path) -> None:
    """Refuse a file whose first bytes are those of another kind than its name.

    Raises:
        DataError: with what to do.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, kind, suffix, advice in MAGIC:
        if start.startswith(magic) and path.suffix != suffix:
            raise DataError(f"{path} contains {kind}, but its name ends in {path.suffix}. {advice}")
