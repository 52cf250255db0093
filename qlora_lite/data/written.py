"""Refuse a row of which the chat template leaves something out.

A template can ignore what it does not know: tools, a second system message, the name of a user.
"""

import json

from qlora_lite.data.messages import Conversation, tool_name
from qlora_lite.data.row_errors import RowError
from qlora_lite.foundation.json_files import shown


def require_written(conversation: Conversation, text: str, declared: str, num_calls: int) -> None:
    """Check that the rendered text has everything that the messages say.

    What links messages (`tool_call_id`, the `name` of a tool message) is not text, and the
    reasoning of turns that are not trained may be left out. Answers are checked by the caller.

    Args:
        declared: a text in which the tools are declared, without calls of them.
        num_calls: as in `TemplateInput`.

    Raises:
        RowError: with what is missing.
    """
    for tool in conversation.tools:
        if tool_name(tool) not in declared:
            raise _missing(f"the tool {tool_name(tool)!r}")
    for i, message in enumerate(conversation.messages):
        if len(message.tool_calls) > num_calls and num_calls < 2:
            what = "tool calls" if num_calls == 0 else "more than one tool call in a message"
            raise _missing(f"{what}, as in message {i}")
        is_answer = message.role == "assistant" and not message.tool_calls
        if not is_answer and not _is_written(message.answer or "", text):
            raise _missing(f"message {i} ({message.role}), {shown(message.content)}, as it is")
        if message.name is not None and message.role != "tool" and message.name not in text:
            raise _missing(f"the name of message {i}, {shown(message.name)}")


def _missing(what: str) -> RowError:
    return RowError(
        None,
        f"the chat template does not write {what}. Remove it from the rows, or set data.template "
        "to a template that writes it",
    )


def _is_written(content: str, text: str) -> bool:
    """Whether a text has some content: as it is, or as JSON."""
    content = content.strip()
    if content in text:
        return True
    forms = (json.dumps(content, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    return any(form in text for form in forms)
