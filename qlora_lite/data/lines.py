"""Lines of a local text file, in UTF-8."""

from collections.abc import Iterator
from pathlib import Path

from qlora_lite.foundation.errors import DataError


def read_lines(path: Path, newline: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Line numbers, from 1, and lines with their line ends. A byte-order mark is removed.

    Args:
        newline: as for `open`; by default every line ends with `\n`.

    Raises:
        DataError: if a line contains a NUL character, as damaged files do.
        UnicodeDecodeError: if the file is not UTF-8.
    """
    with open(path, encoding="utf-8-sig", newline=newline) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise DataError(
                    f"{path}, line {number}: character {line.index(chr(0)) + 1} is NUL, which is "
                    "not text: the file is damaged. Write or download it again"
                )
            yield number, line
