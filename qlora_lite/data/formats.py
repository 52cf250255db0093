"""A row of a file as a conversation, or as plain text.

A format says which fields it needs and how they are read; `FORMATS` is the list, in the order in
which `auto` tries them. Another format is one function and one line there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES = get_args(Role)


class RowError(Exception):
    """What is wrong with a row. Whoever knows the file makes a `DataError` of it."""

    def __init__(self, field: str | None, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}" if field else problem)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the last one is the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Document:
    """Plain text. `is_end` is false where it goes on in the next row of its file."""

    text: str
    is_end: bool = True


@dataclass(frozen=True)
class Fields:
    """How the fields that a format needs are found in a row."""

    row: Mapping[str, Any]
    names: Mapping[str, str]
    prompt: str | None = None

    def name(self, field: str) -> str:
        """The file's name of a field."""
        return self.names.get(field, field)

    def value(self, field: str) -> Any:
        """The value of a field that must be there."""
        name = self.name(field)
        if self.row.get(name) is None:
            there = ", ".join(map(repr, self.row)) or "none"
            raise RowError(name, f"is missing or null; this row has the fields {there}")
        return self.row[name]

    def text(self, field: str) -> str:
        """The value of a field that must be text; a number, such as a label, is written out."""
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(self.name(field), f"got {_kind(value)}, text is needed: {value!r:.80}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(self.name(field), f"got {value}, which is no number")
        return _utf8(str(value), self.name(field))

    def user_text(self) -> str:
        """What the user says: the prompt field, or the row's fields put into `data.prompt`."""
        if self.prompt is None:
            return self.text("prompt")
        try:
            return _utf8(self.prompt.format_map(self.row), "data.prompt")
        except KeyError as error:
            there = ", ".join(map(repr, self.row))
            raise RowError(
                str(error.args[0]), f"is named by data.prompt; this row has the fields {there}"
            ) from None


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
    """`{"instruction": "...", "input": "...", "output": "..."}`, where input may be left out."""
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
    """A kind of row: the fields that it cannot do without, and how it is read."""

    needs: tuple[str, ...]
    read: Callable[[Fields], Conversation | Document]


FORMATS = {
    "messages": Format(("messages",), read_messages),
    "alpaca": Format(("instruction", "output"), read_alpaca),
    "completion": Format(("prompt", "completion"), read_completion),
    "text": Format(("text",), read_text),
}


def find_format(row: Mapping[str, Any], names: Mapping[str, str], has_prompt: bool) -> str | None:
    """The format that a row's fields speak for; fields that the user has named come first."""
    if has_prompt:
        return "completion"
    named = [kind for kind, f in FORMATS.items() if names and set(names) & set(f.needs)]
    for kind in named or FORMATS:
        if all(names.get(field, field) in row for field in FORMATS[kind].needs):
            return kind
    return None


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation, opened by `system` if it has no system message of its own."""
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
    """A conversation that can be trained: it ends in something that the assistant says.

    Raises:
        RowError: if it does not.
    """
    if not messages:
        raise RowError(field, "holds no messages")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise RowError(field, f"message {i} is a system message; only the first can be one")
        if message.role == "assistant" and not message.content.strip():
            raise RowError(field, f"message {i}: the assistant says nothing")
    if messages[-1].role != "assistant":
        raise RowError(
            field, f"ends with the {messages[-1].role}; the last message must be the assistant's"
        )
    return Conversation(messages)


def _utf8(text: str, field: str) -> str:
    """The text, if it can be written; JSON can name a half of a pair of UTF-16, which cannot.

    Raises:
        RowError: with the character that cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            field, f"character {error.start} is {text[error.start]!r}, half of a surrogate pair"
        ) from None
    return text


def _kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
