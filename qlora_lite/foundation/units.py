"""Parse sizes that users write, and format bytes, counts and durations for display."""

import re

from qlora_lite.foundation.errors import RecipeError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str | int) -> int:
    """`"22GiB"`, `"800 MB"` or a plain number of bytes, as a number of bytes.

    Raises:
        RecipeError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _FACTORS:
        raise RecipeError(
            f"got {text!r}, a size is needed. Write a number with a unit, "
            'such as "22GiB", "800MB" or plain bytes'
        )
    size = float(match[1]) * _FACTORS[match[2].lower()]
    if size > 2**63:
        raise RecipeError(f"got a size of {match[1][:20]}..., which is more than any machine has")
    return int(size)


def format_bytes(num_bytes: float) -> str:
    """Bytes in binary units with three significant digits: `3.62 GiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} TiB"


def format_count(count: float) -> str:
    """A count with a decimal suffix: `41.9 M`."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{_three_digits(count)}{unit}"
        count /= 1000
    return f"{_three_digits(count)} T"


def format_seconds(seconds: float) -> str:
    """A duration for display: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}"
