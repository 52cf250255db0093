"""A tokenizer's chat template: the prompt that a model gets, and the trained spans of a row.

If the template marks answers with {% generation %}, the marks are used. Otherwise the row is
composed turn by turn (`data/turns.py`). Every trained answer ends with the special tokens that end
it, and they are trained. What the template writes after the last one is cut off, since generation
stops there. If the template has no such token, the tokenizer's EOS is appended to the row.

A tokenizer without a chat template gets a plain one that needs no new tokens: an assistant message
is followed by EOS, any other message by a line break.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.control_tokens import ControlTokens
from qlora_lite.data.jinja_templates import JinjaTemplate, Span
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.settings import Reasoning
from qlora_lite.data.turns import Tools, Turns
from qlora_lite.data.written import require_written
from qlora_lite.foundation.errors import DataError

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\n' }}{% endif %}"
    "{% endfor %}"
)

_THOUGHT_END = re.compile(r"\s*(?:<[^<>\s]{1,40}>|\[/[A-Z]+\])\s*")
"""What ends reasoning: `</think>`, `[/THINK]`, or a special token such as `<|end|>`."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and the character spans of it that are trained."""

    text: str
    spans: list[Span]
    num_rewritten: int = 0
    """Assistant messages that the template changed."""
    plain: list[Span] = field(default_factory=list)
    """Spans that have the text of special tokens, and are plain text."""


class ChatTemplate:
    """A tokenizer with its chat template, or with the plain one if it has none.

    Raises:
        DataError: if the tokenizer does not map tokens to characters or has no EOS, or its template
            fails on a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"got a {type(tokenizer).__name__}; a tokenizer with a tokenizer.json is needed, "
                "which maps tokens to characters. Use a base that has one"
            )
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has no eos token; set eos_token in its configuration")
        self.tokenizer = tokenizer
        self.adds_bos = adds_bos(tokenizer)
        self.is_plain = tokenizer.chat_template is None
        self.source = self._plain() if self.is_plain else tokenizer.get_chat_template()
        self._jinja = JinjaTemplate(self.source, tokenizer.special_tokens_map)
        self._turns = Turns(self._jinja, tokenizer)
        self.control_tokens = ControlTokens(tokenizer, self._probes())

    @property
    def end_of_turn(self) -> str:
        """The token at which generation stops."""
        return self._turns.ends.last_token

    @property
    def end_of_turn_id(self) -> int:
        """The id of `end_of_turn`."""
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The messages and the generation prompt: the text that the model continues."""
        return self._turns.text(messages, tools, prompt=True)

    def render(self, conversation: Conversation, reasoning: Reasoning = "train") -> Rendered:
        """The text of a conversation up to the end of its last answer, and its trained spans.

        Raises:
            RowError: if the template raises an error or leaves something out, or the trained text
                cannot be found.
        """
        is_trained = [m.role == "assistant" and m.is_trained for m in conversation.messages]
        read = conversation.messages[: len(is_trained) - is_trained[::-1].index(True)]
        messages = tuple(
            self._checked(message, f"message {i} ({message.role})", reasoning)
            for i, message in enumerate(read)
        )
        conversation = replace(conversation, messages=messages)
        if conversation.tools:
            self.control_tokens.require_plain_answer(repr(conversation.tools), "the tools")
        trained = [m for m in messages if m.role == "assistant" and m.is_trained]
        text, spans = self._text_and_spans(conversation)
        self._require_written(conversation, text)
        said = [text[start:end] for start, end in spans]
        if not any(turn.removesuffix(self._turns.ends.after_answer).strip() for turn in said):
            return Rendered(text, [])
        text = text[: spans[-1][1]]
        if len(spans) == len(trained):
            without = [_without_thought(text, s, m) for s, m in zip(spans, trained, strict=True)]
            spans = without if reasoning == "context" else spans
        answers = [(message.answer or "").strip() for message in trained]
        num_rewritten = sum(answer not in "\n".join(said) for answer in answers)
        text, spans, plain = self.control_tokens.reveal(text, spans)
        return Rendered(text, spans, num_rewritten, plain)

    def _checked(self, message: Message, where: str, reasoning: Reasoning) -> Message:
        """A message with what `data.reasoning` leaves of it, without control tokens."""
        if message.role != "assistant":
            self.control_tokens.require_none(message.name or "", where)
            content = self.control_tokens.hide(message.content or "", where)
            return message if content == message.content else replace(message, content=content)
        can_write = self._turns.input.can_write_thought(message)
        if reasoning == "drop":
            message = replace(message, content=message.answer, reasoning=None)
        elif message.thought and message.is_trained and not can_write:
            raise RowError(
                None,
                f"{where} has reasoning, which the chat template does not write. Set "
                "data.reasoning=drop, or data.template to a template that writes it",
            )
        calls = repr(message.tool_calls) if message.tool_calls else ""
        for text in (message.content, message.reasoning, calls, message.name):
            self.control_tokens.require_plain_answer(text or "", where)
        return message

    def _text_and_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text and the trained spans: by the template's marks if it has some. Reasoning of
        trained turns has to be in the marks, one for each; LFM2.5 writes only that of the last."""
        if self._jinja.marks_answers:
            text, spans = self._marked(conversation)
            trained = [m for m in conversation.messages if m.role == "assistant" and m.is_trained]
            thoughts = [message.thought.strip() for message in trained if message.thought]
            are_marked = len(spans) == len(trained) and all(t in text for t in thoughts)
            if not thoughts or are_marked:
                return text, spans
        return self._turns.compose(conversation)

    def _require_written(self, conversation: Conversation, text: str) -> None:
        messages, tools = conversation.messages, conversation.tools
        calls = [i for i, message in enumerate(messages) if message.tool_calls]
        # a call has the name of its tool, too
        declared = self._turns.text(messages[: calls[0]], tools, prompt=True) if calls else text
        require_written(conversation, text, declared, self._turns.input.num_calls)

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text and the marked spans, of the trained turns only."""
        text, spans = self._turns.marked(conversation)
        answers = [message for message in conversation.messages if message.role == "assistant"]
        if all(message.is_trained for message in answers):
            return text, spans
        if len(spans) != len(answers):
            raise RowError(
                None,
                f"some turns are not trained, and the chat template marks {len(spans)} parts for "
                f"{len(answers)} answers. Remove the marks from the template",
            )
        return text, [s for s, m in zip(spans, answers, strict=True) if m.is_trained]

    def _plain(self) -> str:
        return "{{ bos_token }}" + PLAIN_TEMPLATE if self.adds_bos else PLAIN_TEMPLATE

    def _probes(self) -> Iterator[str]:
        """Conversations of plain words, rendered."""
        question, answer = Message("user", "a"), Message("assistant", "b")
        for system in ((), (Message("system", "c"),)):
            with suppress(RowError):  # some templates refuse a system message
                yield self.prompt([*system, question, answer, question])
                yield self._turns.text([*system, question, answer])


def _without_thought(text: str, span: Span, message: Message) -> Span:
    """The span of an answer after its reasoning.

    Raises:
        RowError: if the reasoning is not there.
    """
    thought = message.thought
    if not thought:
        return span
    start = text.find(thought.strip(), *span)
    end = _THOUGHT_END.match(text, start + len(thought.strip())) if start >= 0 else None
    if end is None:
        raise RowError(
            None,
            f"the chat template does not write the reasoning {thought!r:.80}. Set "
            "data.reasoning=drop",
        )
    return end.end(), span[1]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS in front of a text.

    The ids alone do not say: without an entry for a word, some tokenizers return BOS for it.
    """
    word = tokenizer("a", add_special_tokens=False).input_ids
    return tokenizer("a").input_ids[: len(word) + 1] == [tokenizer.bos_token_id, *word]
