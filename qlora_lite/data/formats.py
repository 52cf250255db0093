"""Turn a row of a file into a conversation or plain text.

`FORMATS` lists the formats in the order in which `auto` tries them. A new format is one function
and one line there.
"""

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qlora_lite.data.messages import (
    Conversation,
    Message,
    read_message,
    read_tools,
    require_conversation,
)
from qlora_lite.data.row_errors import RowError, kind_of, require_utf8
from qlora_lite.foundation.json_files import shown


@dataclass(frozen=True)
class Document:
    """Plain text. `is_end` is false if the text continues in the next row."""

    text: str
    is_end: bool = True


@dataclass(frozen=True)
class Fields:
    """The fields of a row, by the names that the formats use.

    `names` maps these to the names in the file; `prompt` is the template `data.prompt`.
    """

    row: Mapping[str, Any]
    names: Mapping[str, str]
    prompt: str | None = None

    def name(self, field: str) -> str:
        """The name of a field in the file."""
        return self.names.get(field, field)

    def value(self, field: str) -> Any:
        """The value of a required field."""
        name = self.name(field)
        if self.row.get(name) is None:
            present = ", ".join(map(repr, self.row)) or "none"
            raise RowError(name, f"is missing or null; this row has the fields {present}")
        return self.row[name]

    def text(self, field: str) -> str:
        """A required field as text. Numbers, such as labels, are converted."""
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(
                self.name(field), f"got {kind_of(value)}, text is needed: {shown(value)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(self.name(field), f"got {value}, a finite number is needed")
        return require_utf8(str(value), self.name(field))

    def user_text(self) -> str:
        """The user message: the prompt field, or `data.prompt` filled with the row's fields."""
        if self.prompt is None:
            return self.text("prompt")
        for name in fields_in(self.prompt):
            self._require_text(name)
        try:
            return require_utf8(self.prompt.format_map(self.row), "data.prompt")
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise RowError("data.prompt", f"cannot be filled from this row: {error}") from None

    def _require_text(self, name: str) -> None:
        """Check that a field can be put into `data.prompt`."""
        if name not in self.row:
            present = ", ".join(map(repr, self.row))
            raise RowError(name, f"is used in data.prompt; this row has the fields {present}")
        value = self.row[name]
        is_text = isinstance(value, str | int | float)
        if not is_text or (isinstance(value, float) and not math.isfinite(value)):
            raise RowError(name, f"is used in data.prompt; got {shown(value)}, text is needed")


def read_messages(fields: Fields) -> Conversation:
    """`{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}`."""
    field = fields.name("messages")
    messages = fields.value("messages")
    if not isinstance(messages, list | tuple):
        raise RowError(field, f"got {kind_of(messages)}, a list of messages is needed")
    tools = fields.name("tools")
    return require_conversation(
        [read_message(message, f"{field}[{i}]") for i, message in enumerate(messages)],
        field,
        read_tools(fields.row.get(tools), tools),
    )


def read_alpaca(fields: Fields) -> Conversation:
    """`{"instruction": "...", "input": "...", "output": "..."}`; `input` is optional."""
    user = fields.text("instruction")
    if fields.row.get(fields.name("input")) not in (None, ""):
        user = f"{user}\n\n{fields.text('input')}"
    turns = (Message("user", user), Message("assistant", fields.text("output")))
    return require_conversation(turns, fields.name("output"))


def read_completion(fields: Fields) -> Conversation:
    """`{"prompt": "...", "completion": "..."}`."""
    turns = (Message("user", fields.user_text()), Message("assistant", fields.text("completion")))
    return require_conversation(turns, fields.name("completion"))


def read_text(fields: Fields) -> Document:
    """`{"text": "..."}`."""
    text = fields.text("text")
    if not text.strip():
        raise RowError(fields.name("text"), "is empty")
    return Document(text)


@dataclass(frozen=True)
class Format:
    """A kind of row: the fields that it requires, the function that reads it, and other fields."""

    needs: tuple[str, ...]
    read: Callable[[Fields], Conversation | Document]
    optional: tuple[str, ...] = ()


FORMATS = {
    "messages": Format(("messages",), read_messages, optional=("tools",)),
    "alpaca": Format(("instruction", "output"), read_alpaca, optional=("input",)),
    "completion": Format(("prompt", "completion"), read_completion),
    "text": Format(("text",), read_text),
}


def find_format(row: Mapping[str, Any], names: Mapping[str, str], has_prompt: bool) -> str | None:
    """The first format whose required fields the row has, or None.

    If the user named fields of some formats (`names`), only those formats are tried.
    """
    if has_prompt:
        return "completion"
    named = [kind for kind, f in FORMATS.items() if names and set(names) & set(f.needs)]
    for kind in named or FORMATS:
        if all(names.get(field, field) in row for field in FORMATS[kind].needs):
            return kind
    return None


@lru_cache
def fields_in(prompt: str) -> frozenset[str]:
    """The fields that a template such as `data.prompt` uses."""
    parts = string.Formatter().parse(prompt)
    return frozenset(name for _, name, _, _ in parts if name is not None)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with the message `system` in front, unless it has a system message."""
    if system is None or conversation.messages[0].role in ("system", "developer"):
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))
