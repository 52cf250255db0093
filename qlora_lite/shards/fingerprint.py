"""Hashes that identify the files of a checkpoint."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qlora_lite.foundation.files import file_hash

_SAMPLE_BYTES, _NUM_SAMPLES = 4096, 64


def sampled_hash(headers: Iterable[tuple[Path, int, int]]) -> str:
    """SHA-256 of names, sizes, headers and 64 evenly spaced samples: quick for any size.

    Args:
        headers: each file, with the first byte of its header and the first one after it.
    """
    digest = hashlib.sha256()
    for file, start, stop in headers:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as handle:
            handle.seek(start)
            digest.update(handle.read(stop - start))
            for i in range(_NUM_SAMPLES):
                handle.seek(stop + (size - stop) * i // _NUM_SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def hash_of_all(files: Iterable[Path]) -> str:
    """SHA-256 of names and all bytes: about a second per GB."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()
