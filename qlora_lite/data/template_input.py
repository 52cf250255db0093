"""The form in which a chat template takes messages.

Templates agree on roles and on text. They differ in the rest, so each form is tried on words that
no template contains:

- `content` is text; for some templates of image models, a list of parts.
- `content` beside tool calls is null, or empty text where null fails or is written as "None".
- The arguments of a tool call are an object, or JSON text where an object fails or is written as
  Python shows it.
- Reasoning has a field of its own, is a <think> section of the content, or is dropped. If it is
  dropped and the prompt ends in <think>, it can be put there (`data/turns.py`). A section is made
  of a field only if the template names <think>: other models may reason in another form.
- A developer message is a system message if the template does not have that role.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from qlora_lite.data.jinja_templates import JinjaTemplate
from qlora_lite.data.messages import Message, ToolCall
from qlora_lite.data.row_errors import RowError

QUESTION, ANSWER, THOUGHT, OTHER = "qzmv", "wxkj", "vyfq", "hbtn"
"""Words that no template contains."""

OPEN_THOUGHT = re.compile(r"\s*<think>\s*")
"""A prompt ends in this if the model has to think."""

Place = Literal["field", "content", "prompt"]


class TemplateInput:
    """How messages are given to this template."""

    def __init__(self, template: JinjaTemplate) -> None:
        self._template = template

    def of(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        """Messages as the template takes them."""
        return [self._message(message) for message in messages]

    def can_write_thought(self, message: Message) -> bool:
        """Whether the reasoning of an answer has a place."""
        place = self._place_of_thought(message)
        is_text = message.reasoning is None
        return place is not None and (place != "content" or is_text or self._names_sections)

    @property
    def _names_sections(self) -> bool:
        return "<think>" in self._template.source

    def _place_of_thought(self, message: Message) -> Place | None:
        """Where the reasoning of an answer is put, or None if the template drops it.

        Gemma 4 writes it only with tool calls.
        """
        if message.tool_calls and self._takes_thoughts_with_calls:
            return "field"
        return self._place_of_thoughts

    @cached_property
    def _takes_thoughts_with_calls(self) -> bool:
        said = {"content": self._null_content, "reasoning_content": OTHER}
        return OTHER in self._try({"role": "assistant", "tool_calls": [self._call(_CALL)]} | said)

    @cached_property
    def _place_of_thoughts(self) -> Place | None:
        plain = {"role": "assistant", "content": ANSWER}
        if THOUGHT in self._try(plain | {"reasoning_content": THOUGHT}):
            return "field"
        if THOUGHT in self._try(plain | {"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}):
            return "content"
        question = {"role": "user", "content": self._text(QUESTION)}
        prompt, _ = self._template.render([question], add_generation_prompt=True)
        return "prompt" if re.search(f"{OPEN_THOUGHT.pattern}$", prompt) else None

    @cached_property
    def num_calls(self) -> int:
        """How many tool calls of one message the template writes: 0, 1, or 2 for any number."""
        words = (ANSWER, OTHER)
        calls = [self._call(ToolCall("call", {THOUGHT: w}, f"call0000{w[0]}")) for w in words]
        for number in (2, 1):
            message = {"role": "assistant", "content": self._null_content}
            text = self._try(message | {"tool_calls": calls[:number]})
            if all(word in text for word in words[:number]):
                return number
        return 0

    def _message(self, message: Message) -> dict[str, Any]:
        role = message.role
        if role == "developer" and not self._has_developers:
            role = "system"
        found: dict[str, Any] = {"role": role}
        content, thought = message.content, ""
        place = self._place_of_thought(message) if role == "assistant" else None
        if role == "assistant" and place != "content":
            content, thought = message.answer, message.thought
        elif place == "content" and message.reasoning and self._names_sections:
            content = f"<think>\n{message.thought}\n</think>\n\n{content or ''}"
        content = self._null_content if content is None else content
        found["content"] = None if content is None else self._text(content)
        if thought and place == "field":
            found["reasoning_content"] = thought
        if message.tool_calls:
            found["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            found["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            found["name"] = message.name
        return found

    def _text(self, content: str) -> Any:
        return [{"type": "text", "text": content}] if self._takes_parts else content

    def _call(self, call: ToolCall, as_text: bool | None = None) -> dict[str, Any]:
        as_text = self._arguments_are_text if as_text is None else as_text
        arguments: Any = dict(call.arguments)
        if as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        found: dict[str, Any] = {
            "type": "function",
            "function": {"name": call.name, "arguments": arguments},
        }
        return found if call.call_id is None else {"id": call.call_id, **found}

    @cached_property
    def _takes_parts(self) -> bool:
        user = {"role": "user", "content": QUESTION}
        try:
            text, _ = self._template.render([user, {"role": "assistant", "content": ANSWER}])
        except RowError:
            text = ""
        if QUESTION in text and ANSWER in text:
            return False
        parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in _PAIR]
        try:
            text, _ = self._template.render(parts)
        except RowError:
            return False
        return QUESTION in text and ANSWER in text

    @cached_property
    def _has_developers(self) -> bool:
        if "developer" not in self._template.source:
            return False  # written as it is by templates that take any role, but unknown to models
        developer = {"role": "developer", "content": self._text(OTHER)}
        return OTHER in self._try({"role": "assistant", "content": ANSWER}, developer)

    @cached_property
    def _null_content(self) -> str | None:
        text = self._try({"role": "assistant", "content": None, "tool_calls": [self._call(_CALL)]})
        return None if ANSWER in text and "None" not in text else ""

    @cached_property
    def _arguments_are_text(self) -> bool:
        for content in (None, ""):
            for as_text in (False, True):
                calls = [self._call(_CALL, as_text)]
                message = {"role": "assistant", "content": content, "tool_calls": calls}
                text = self._try(message)
                if ANSWER in text and f"'{THOUGHT}'" not in text:
                    return as_text
        return False

    def _try(self, answer: Mapping[str, Any], *before: Mapping[str, Any]) -> str:
        """A question and this answer, rendered; empty if the template raises an error."""
        if isinstance(answer["content"], str):
            answer = {**answer, "content": self._text(answer["content"])}
        try:
            question = {"role": "user", "content": self._text(QUESTION)}
            return self._template.render([*before, question, answer])[0]
        except RowError:
            return ""


_PAIR = (("user", QUESTION), ("assistant", ANSWER))
_CALL = ToolCall("call", {THOUGHT: ANSWER}, "123456789")
