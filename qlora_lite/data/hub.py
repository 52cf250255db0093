"""Data sets of the Hugging Face hub, or of its cache."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_lite.data.hf_datasets import quiet_datasets
from qlora_lite.foundation.errors import DataError


def load_hub_rows(
    repository: str, configuration: str | None, split: str | None, name: str
) -> tuple[Callable[[], Iterator[tuple[int, dict[str, Any]]]], str]:
    """A function that starts reading the numbered rows, and the fingerprint of the data set.

    Args:
        name: the id as the user wrote it, for messages.

    Raises:
        DataError: if the data set cannot be loaded.
    """
    import datasets

    with _errors_of(name), quiet_datasets():
        table = datasets.load_dataset(repository, configuration, split=split or "train")
    fingerprint = "; ".join(_version(file["filename"]) for file in table.cache_files)

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with _errors_of(name):
            yield from enumerate(table, start=1)

    return rows, fingerprint


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Turn what `datasets` raises for a missing or damaged data set into a `DataError`."""
    import datasets
    import pyarrow

    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
        ImportError,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
    ) as error:
        raise DataError(
            f"the data set {name!r} cannot be read from the hub or its cache: "
            f"{type(error).__name__}: {error}. Give a configuration and a split as in "
            "openai/gsm8k:main::train, or the path of a file"
        ) from None


def parse_hub_id(name: str) -> tuple[str, str | None, str | None] | None:
    """Repository, configuration and split of `owner/name[:configuration][::split]`, or None."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:::([\w.\[\]:%+-]+))?", name)
    return None if match is None else (match[1], match[2], match[3])


def _version(cached: str) -> str:
    """Configuration, version, revision and file name of a cached part of a data set."""
    return "/".join(Path(cached).parts[-4:])
