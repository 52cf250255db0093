"""Turn a row of a file into a conversation or plain text.

`FORMATS` lists the formats in the order in which `auto` tries them. A new format is one function
and one line there.
"""

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from qlora_lite.foundation.json_files import shown

Role = Literal["system", "user", "assistant"]
ROLES = get_args(Role)


class RowError(Exception):
    """Something wrong with a row. The caller, who knows file and line, raises a `DataError`."""

    def __init__(self, field: str | None, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}" if field else problem)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the last one is from the assistant."""

    messages: tuple[Message, ...]


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
            raise RowError(self.name(field), f"got {_kind(value)}, text is needed: {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(self.name(field), f"got {value}, a finite number is needed")
        return _utf8(str(value), self.name(field))

    def user_text(self) -> str:
        """The user message: the prompt field, or `data.prompt` filled with the row's fields."""
        if self.prompt is None:
            return self.text("prompt")
        for name in fields_in(self.prompt):
            self._require_text(name)
        try:
            return _utf8(self.prompt.format_map(self.row), "data.prompt")
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
    """`{"messages": [{"role": "user", "content": "..."}, ...]}`."""
    field = fields.name("messages")
    messages = fields.value("messages")
    if not isinstance(messages, list | tuple):
        raise RowError(field, f"got {_kind(messages)}, a list of messages is needed")
    return _conversation(
        tuple(_message(message, f"{field}[{i}]") for i, message in enumerate(messages)), field
    )


def read_alpaca(fields: Fields) -> Conversation:
    """`{"instruction": "...", "input": "...", "output": "..."}`; `input` is optional."""
    user = fields.text("instruction")
    if fields.row.get(fields.name("input")) not in (None, ""):
        user = f"{user}\n\n{fields.text('input')}"
    turns = (Message("user", user), Message("assistant", fields.text("output")))
    return _conversation(turns, fields.name("output"))


def read_completion(fields: Fields) -> Conversation:
    """`{"prompt": "...", "completion": "..."}`."""
    turns = (Message("user", fields.user_text()), Message("assistant", fields.text("completion")))
    return _conversation(turns, fields.name("completion"))


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
    "messages": Format(("messages",), read_messages),
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
    if system is None or conversation.messages[0].role == "system":
        return conversation
    return Conversation((Message("system", system), *conversation.messages))


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(field, f'got {_kind(message)}, {{"role": ..., "content": ...}} is needed')
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise RowError(f"{field}.role", f"got {role!r}, one of {', '.join(ROLES)} is needed")
    if not isinstance(content, str):
        raise RowError(f"{field}.content", f"got {_kind(content)}, text is needed")
    return Message(role, _utf8(content, f"{field}.content"))


def _conversation(messages: tuple[Message, ...], field: str) -> Conversation:
    """A conversation that can be trained.

    Raises:
        RowError: if it is empty, does not end with the assistant, or has an empty answer.
    """
    if not messages:
        raise RowError(field, "has no messages")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise RowError(field, f"message {i} is a system message; only the first can be one")
        if message.role == "assistant" and not message.content.strip():
            raise RowError(field, f"message {i}: the assistant message is empty")
    if messages[-1].role != "assistant":
        raise RowError(
            field, f"ends with the {messages[-1].role}; the last message must be the assistant's"
        )
    return Conversation(messages)


def _utf8(text: str, field: str) -> str:
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


def _kind(value: Any) -> str:
    """The type of a value, by its JSON name."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
