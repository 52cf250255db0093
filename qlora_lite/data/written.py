"""Refuse a row of which the chat template leaves something out.

A template can ignore what it does not know: tools, a second system message, the name of a user.
"""

import json
from typing import Any

from qlora_lite.data.messages import Conversation, Message, tool_name
from qlora_lite.data.row_errors import RowError
from qlora_lite.foundation.json_files import shown

_REMOVE = "Remove it from the rows, or set data.template to a template that writes it"


def require_written(conversation: Conversation, text: str) -> None:
    """Check that the rendered text has everything that the messages say.

    What links messages (`tool_call_id`, the `name` of a tool message) is not text, and the
    reasoning of turns that are not trained may be left out. Answers are checked by the caller.

    Raises:
        RowError: with what is missing.
    """
    for tool in conversation.tools:
        if tool_name(tool) not in text:
            raise RowError(
                "tools", f"the chat template does not write the tool {tool_name(tool)!r}. {_REMOVE}"
            )
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant" and not _is_written(message.content or "", text):
            raise RowError(
                None,
                f"the chat template does not write message {i} ({message.role}), "
                f"{shown(message.content)}, or changes it. {_REMOVE}",
            )
        if message.name is not None and message.role != "tool" and message.name not in text:
            raise RowError(
                None,
                f"the chat template does not write the name of message {i}, "
                f"{shown(message.name)}. {_REMOVE}",
            )
        _require_calls(message, i, text)


def _require_calls(message: Message, index: int, text: str) -> None:
    for call in message.tool_calls:
        values = [call.name, *call.arguments, *_leaves(dict(call.arguments))]
        missing = [value for value in values if not _is_written(value, text)]
        if missing:
            raise RowError(
                None,
                f"the chat template does not write {shown(missing[0])} of the tool calls in "
                f"message {index}. {_REMOVE}",
            )


def _leaves(value: Any) -> list[str]:
    """The texts and numbers in a JSON value."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in _leaves(v)]
    return [value if isinstance(value, str) else json.dumps(value)]


def _is_written(content: str, text: str) -> bool:
    """Whether a text has some content: as it is, or as JSON."""
    content = content.strip()
    if content in text or content.lower() in ("true", "false", "null"):
        return True
    forms = (json.dumps(content, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    return any(form in text for form in forms)
