"""A conversation, and how its messages are read from a row.

The messages are those of OpenAI's format: roles, text or a list of text parts, tool calls, and
reasoning in a field or in a <think> section. Whether a turn is trained is a field of its message.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from qlora_lite.data.row_errors import RowError, kind_of, require_utf8
from qlora_lite.foundation.json_files import shown

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields with the reasoning of a message."""

TRAINED = ("train", "trainable", "train_on_turn", "weight", "loss", "loss_mask", "loss_weight")
"""Fields that say whether a turn is trained: 1 or true, 0 or false."""

MASKED = ("mask", "masked")
"""Fields that say whether a turn is left out of the loss: 1 or true, 0 or false."""

READ = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING, *TRAINED, *MASKED)
"""Fields of a message that are read here."""

_THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)*?)</think>\s*(.*)", re.DOTALL)
"""The reasoning at the start of an answer. DeepSeek-R1's answers lack the opening tag, which is in
the prompt."""


class _Sparse:
    """A dataclass that shows only the fields that are set."""

    def __repr__(self) -> str:
        """Rows are held out by a hash of this text, so it does not change with a new field."""
        fields = [f for f in dataclasses.fields(self) if f.repr]  # type: ignore[arg-type]
        values = [(f, getattr(self, f.name)) for f in fields]
        shown_fields = [f"{f.name}={v!r}" for f, v in values if v != f.default]
        return f"{type(self).__name__}({', '.join(shown_fields)})"


@dataclass(frozen=True, repr=False)
class ToolCall(_Sparse):
    """A function that the assistant calls."""

    name: str
    arguments: Mapping[str, Any]
    call_id: str | None = None


@dataclass(frozen=True, repr=False)
class Message(_Sparse):
    """One turn."""

    role: Role
    content: str | None
    """None only if there are tool calls."""
    reasoning: str | None = None
    """From a field. Reasoning in the content is still there."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    is_trained: bool = True
    """Only of assistant messages."""

    @cached_property
    def thought(self) -> str:
        """The reasoning, from its field or from the start of the content. Empty if there is none"""
        return self._split[0]

    @cached_property
    def answer(self) -> str | None:
        """The content without reasoning."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[str, str | None]:
        content = self.content or ""
        if self.role != "assistant" or self.reasoning is not None or "</think>" not in content:
            return (self.reasoning or "").strip("\n"), self.content
        match = _THOUGHT.fullmatch(content)
        return (match[1].strip("\n"), match[2]) if match else ("", self.content)


@dataclass(frozen=True, repr=False)
class Conversation(_Sparse):
    """Messages, of which the last one is from the assistant."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schemas."""


def read_message(message: Any, field: str) -> Message:
    """A message of a row.

    Raises:
        RowError: with the field, if there is something wrong with it.
    """
    if not isinstance(message, Mapping):
        raise RowError(field, f'got {kind_of(message)}, {{"role": ..., "content": ...}} is needed')
    role = _role(message.get("role"), f"{field}.role")
    calls = _tool_calls(message.get("tool_calls"), f"{field}.tool_calls")
    reasoning = _reasoning(message, field)
    if role != "assistant" and (calls or reasoning):
        name = "tool_calls" if calls else "reasoning"
        raise RowError(f"{field}.{name}", f"is in a message of the {role}, not of the assistant")
    return Message(
        role,
        _content(message.get("content"), f"{field}.content", may_be_null=bool(calls)),
        reasoning,
        calls,
        _optional_text(message, "tool_call_id", field),
        _optional_text(message, "name", field),
        _is_trained(message, field),
    )


def read_tools(tools: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """The functions that a row declares: a list of JSON schemas, or its JSON text.

    Raises:
        RowError: if they are something else.
    """
    found = _from_json(tools, field)
    if found in (None, ""):
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(t, Mapping) for t in found):
        raise RowError(field, f"got {shown(tools)}, a list of function schemas is needed")
    for i, tool in enumerate(found):
        if not isinstance(_schema(tool).get("name"), str):
            raise RowError(f"{field}[{i}]", f"got {shown(tool)}, a function with a name is needed")
    return tuple(without_nulls(tool) for tool in found)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a function that `read_tools` returned."""
    return str(_schema(tool)["name"])


def require_conversation(
    messages: Sequence[Message], field: str, tools: tuple[Mapping[str, Any], ...] = ()
) -> Conversation:
    """A conversation that can be trained.

    Raises:
        RowError: if it is empty, does not end with the assistant, or has an empty answer.
    """
    if not messages:
        raise RowError(field, "has no messages")
    for i, message in enumerate(messages):
        is_empty = not (message.content or "").strip() and not message.tool_calls
        if message.role == "assistant" and is_empty:
            raise RowError(field, f"message {i}: the assistant message is empty")
    if messages[-1].role != "assistant":
        raise RowError(
            field, f"ends with the {messages[-1].role}; the last message must be the assistant's"
        )
    if not any(m.role == "assistant" and m.is_trained for m in messages):
        raise RowError(field, "no turn of the assistant is trained. Remove the row")
    return Conversation(tuple(messages), tools)


def without_nulls(value: Any) -> Any:
    """A JSON value without the null fields that tables add to objects."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list | tuple) else value


def _role(role: Any, field: str) -> Role:
    for known in ROLES:
        if role == known:
            return known
    raise RowError(field, f"got {shown(role)}, one of {', '.join(ROLES)} is needed")


def _schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _content(content: Any, field: str, *, may_be_null: bool) -> str | None:
    if content is None and may_be_null:
        return None
    if isinstance(content, str):
        return require_utf8(content, field)
    if not isinstance(content, list | tuple) or not content:
        raise RowError(field, f"got {kind_of(content)}, text is needed")
    texts = []
    for i, part in enumerate(content):
        found = without_nulls(part) if isinstance(part, Mapping) else {}
        text = found.get("text")
        if not isinstance(text, str) or set(found) != {"type", "text"}:
            raise RowError(f"{field}[{i}]", f"got {shown(part)}, only text is supported")
        texts.append(require_utf8(text, f"{field}[{i}]"))
    return "".join(texts)


def _reasoning(message: Mapping[str, Any], field: str) -> str | None:
    names = [name for name in REASONING if message.get(name) not in (None, "", False)]
    values = []
    for name in names:
        if not isinstance(message[name], str):
            raise RowError(f"{field}.{name}", f"got {shown(message[name])}, text is needed")
        values.append(require_utf8(message[name], f"{field}.{name}"))
    if len(set(values)) > 1:
        raise RowError(f"{field}.{names[1]}", f"differs from {names[0]}. Keep one of them")
    return values[0] if values else None


def _optional_text(message: Mapping[str, Any], name: str, field: str) -> str | None:
    value = message.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RowError(f"{field}.{name}", f"got {shown(value)}, text is needed")
    return require_utf8(value, f"{field}.{name}")


def _tool_calls(calls: Any, field: str) -> tuple[ToolCall, ...]:
    found = _from_json(calls, field) or ()
    if not isinstance(found, list | tuple):
        raise RowError(field, f"got {shown(calls)}, a list of function calls is needed")
    return tuple(_tool_call(call, f"{field}[{i}]") for i, call in enumerate(found))


def _tool_call(call: Any, field: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(field, f'got {shown(call)}, {{"function": {{"name": ...}}}} is needed')
    arguments = _from_json(function.get("arguments"), f"{field}.arguments")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{field}.arguments", f"got {shown(arguments)}, a JSON object is needed")
    call_id = call.get("id")
    return ToolCall(
        require_utf8(function["name"], field),
        arguments,
        None if call_id in (None, "") else str(call_id),
    )


def _from_json(value: Any, field: str) -> Any:
    """A value that may be JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(field, f"got {shown(value)}, which is not JSON: {error}") from None


def _is_trained(message: Mapping[str, Any], field: str) -> bool:
    """Whether the fields of a message have the turn trained. Tables have numbers as text.

    Raises:
        RowError: if one is a weight other than 0 and 1, or two of them disagree.
    """
    found: dict[str, bool] = {}
    for name in (*TRAINED, *MASKED):
        value = message.get(name)
        text = str(value).strip().lower()
        if value is None or text in ("", "nan", "null", "none"):
            continue
        if text not in ("0", "0.0", "false", "1", "1.0", "true"):
            raise RowError(f"{field}.{name}", f"got {shown(value)}, 0 or 1 is needed")
        found[name] = (text in ("1", "1.0", "true")) == (name in TRAINED)
    if len(set(found.values())) > 1:
        raise RowError(field, f"the fields {', '.join(found)} disagree whether it is trained")
    return all(found.values())
