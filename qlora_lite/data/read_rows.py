"""Read the rows of a source as conversations or documents, in the format of its first row."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_lite.data.dropped_fields import refused_fields, require_neutral
from qlora_lite.data.formats import FORMATS, Document, Fields, find_format, with_system
from qlora_lite.data.messages import Conversation
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.settings import Data
from qlora_lite.data.sources import Source
from qlora_lite.foundation.errors import DataError

Item = Conversation | Document


def read_rows(source: Source, data: Data) -> Iterator[tuple[int, Item]]:
    """The numbered rows of a source.

    Raises:
        DataError: for a row that does not fit the format, with file, line and field; at the end,
            if a field of `data.fields` was in no row.
    """
    if source.is_text_file:
        for number, row in source.rows():
            yield number, Document(row["text"], row["is_end"])
        return
    names = data.fields or {}
    seen: set[str] = set()
    kind: str | None = None
    for number, row in source.rows():
        if kind is None:
            kind = _choose_format(data, row, source.where(number))
            refused = refused_fields(kind, FORMATS[kind], names, data.prompt)
            messages = names.get("messages", "messages") if kind == "messages" else None
        seen.update(name for name in names if names[name] in row)
        try:
            require_neutral(row, refused, messages)
            item = FORMATS[kind].read(Fields(row, names, data.prompt))
        except RowError as error:
            raise DataError(f"{source.where(number)}: {error}") from None
        yield number, with_system(item, data.system) if isinstance(item, Conversation) else item
    if unused := sorted(names.keys() - seen):
        raise DataError(
            f"data.fields says that {unused[0]} is the field {names[unused[0]]!r}, but no row of "
            f"{source.name} has it. Correct the name, or remove {unused[0]}"
        )


def _choose_format(data: Data, row: Mapping[str, Any], where: str) -> str:
    """The format in the settings, or the one that the first row has."""
    has_prompt = data.prompt is not None
    if has_prompt and data.format not in ("auto", "completion"):
        raise DataError(
            f"data.prompt needs the format completion, but data.format is {data.format}. "
            "Remove one of the two"
        )
    is_auto = data.format == "auto"
    kind = find_format(row, data.fields or {}, has_prompt) if is_auto else data.format
    if kind is None:
        raise DataError(_unknown_format(row, data.fields or {}, where))
    return kind


def _unknown_format(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> str:
    """The error message for a row that has the fields of no format."""
    if not row:
        return f"{where}: the row has no fields. Remove it"
    present = ", ".join(map(repr, row))
    absent = [name for name in names.values() if name not in row]
    if absent:
        near = difflib.get_close_matches(absent[0], row, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return (
            f"{where}: there is no field {absent[0]!r}, which data.fields names.{hint} "
            f"The row has {present}"
        )
    if {"chosen", "rejected"} <= row.keys():
        is_chat = isinstance(row["chosen"], list | tuple)
        field = "messages" if is_chat else "completion" if "prompt" in row else "text"
        return (
            f"{where}: this is a preference row (chosen and rejected), for which there is no "
            "training yet. To train on the chosen answers alone, map them: "
            f'data.fields=\'{{"{field}": "chosen"}}\''
        )
    known = "; ".join(f"{kind}: {', '.join(f.needs)}" for kind, f in FORMATS.items())
    return (
        f"{where}: the fields {present} belong to no known format ({known}). Map them with "
        'data.fields, such as \'{"prompt": "question", "completion": "answer"}\'. If this is the '
        "first line of a csv or tsv file without a header, also set data.columns"
    )
