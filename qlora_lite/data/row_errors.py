"""Errors in rows."""

from typing import Any


class RowError(Exception):
    """Something wrong with a row. The caller, who knows file and line, raises a `DataError`."""

    def __init__(self, field: str | None, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}" if field else problem)


def kind_of(value: Any) -> str:
    """The type of a value, by its JSON name."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def require_utf8(text: str, field: str) -> str:
    """The text itself, after a check: JSON escapes may encode half of a surrogate pair.

    Raises:
        RowError: with the position of such a half.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            field, f"character {error.start} is {text[error.start]!r}, half of a surrogate pair"
        ) from None
    return text
