"""Render a conversation with the tokenizer's chat template, and find the assistant's text in it.

The whole conversation is rendered at once, so that training sees the same text as inference. The
trained spans of the text are found in one of two ways:

- if the template marks them with {% generation %}, the marks are used;
- otherwise each span starts where the previous messages end, rendered with the generation prompt,
  and ends with the next end-of-turn token. That rendering must be a prefix of the whole text.

The end-of-turn token is found by rendering a short conversation: it is the first special token
after the answer. Every row ends with it, and it is trained. Text that the template writes after the
last one is cut off, since generation stops there. If the template writes no such token, the
tokenizer's EOS is appended to the row.

A tokenizer without a chat template gets a plain one that needs no new tokens: an assistant message
is followed by EOS, any other message by a line break.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_lite.data.control_tokens import ControlTokens, special_tokens
from qlora_lite.data.formats import Conversation, Message, RowError
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.limits import LimitReached, limited

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\n' }}{% endif %}"
    "{% endfor %}"
)

# Some templates write today's date. With a fixed date the tokens are the same every day, so that a
# run can resume.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

RENDER_SECONDS, RENDER_BYTES = 10.0, 2**30
"""For one conversation. A common one takes less than a millisecond and a megabyte."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and the character spans of it that are trained."""

    text: str
    spans: list[Span]
    num_rewritten: int = 0
    """Assistant messages that the template changed: some templates drop reasoning."""


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
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self.adds_bos = _adds_bos(tokenizer)
        self.is_plain = tokenizer.chat_template is None
        self.source = self._plain() if self.is_plain else tokenizer.get_chat_template()
        _require_no_powers(self.source)
        self.marks_answers = re.search(r"{%-?\s*generation\s*-?%}", self.source) is not None
        self.end_of_turn, self.appends_end = self._find_end_of_turn()
        self.control_tokens = ControlTokens(tokenizer, self._probes())

    @property
    def end_of_turn_id(self) -> int:
        """The token at which generation stops."""
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The messages and the generation prompt: the text that the model continues."""
        return self._text(messages, add_generation_prompt=True)[0]

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation up to its last end-of-turn token, and its trained spans.

        Raises:
            RowError: if the template raises an error, or the assistant's text cannot be found.
        """
        messages = conversation.messages
        for i, message in enumerate(messages):
            self.control_tokens.require_none(message.content, f"message {i} ({message.role})")
        text, marked = self._text(messages)
        if self.appends_end:
            text = text.rstrip() + self.end_of_turn
        if self.marks_answers:
            spans = [self._extend_to_end_of_turn(text, span) for span in marked]
        else:
            spans = self._spans_by_prefix(text, messages)
        if not any(text[start:end].removesuffix(self.end_of_turn).strip() for start, end in spans):
            return Rendered(text, [])
        if not text[: spans[-1][1]].endswith(self.end_of_turn):
            raise RowError(None, f"the template does not close the answer with {self.end_of_turn}")
        trained = "\n".join(text[start:end] for start, end in spans)
        contents = [m.content.strip() for m in messages if m.role == "assistant"]
        num_rewritten = sum(content not in trained for content in contents)
        return Rendered(text[: spans[-1][1]], spans, num_rewritten)

    def _plain(self) -> str:
        return "{{ bos_token }}" + PLAIN_TEMPLATE if self.adds_bos else PLAIN_TEMPLATE

    def _text(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The rendered messages, and the spans that the template marks."""
        dated = "strftime_now" in self.source
        try:
            with limited(RENDER_SECONDS, RENDER_BYTES):
                texts, marks = render_jinja_template(
                    conversations=[[{"role": m.role, "content": m.content} for m in messages]],
                    chat_template=FIXED_DATE + self.source if dated else self.source,
                    return_assistant_tokens_mask=self.marks_answers,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
        except LimitReached as error:
            raise DataError(
                f"the tokenizer's chat template does not end: {error} for one conversation. "
                "Give the tokenizer another chat template"
            ) from None
        except RecursionError:
            raise RowError(None, "the chat template calls itself without end") from None
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise RowError(None, f"the chat template refuses these messages: {error}") from None
        return texts[0], [tuple(span) for span in marks[0]] if self.marks_answers else []

    def _find_end_of_turn(self) -> tuple[str, bool]:
        """The token that ends an answer, and whether we have to append it ourselves."""
        answer = "qwertz"
        question = Message("user", "a")
        try:
            text, _ = self._text([question, Message("assistant", answer)])
        except RowError as error:
            raise DataError(
                f"the tokenizer's chat template fails on a question and an answer: {error}"
            ) from None
        _, found, tail = text.rpartition(answer)
        if not found:
            raise DataError(
                "the tokenizer's chat template leaves out the assistant's message: it renders a "
                f"question and an answer as {text!r}. Give the tokenizer a chat template for "
                "conversations"
            )
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        special |= special_tokens(self.tokenizer)
        ends = [token for token in special if token.strip() and token in tail]
        if not ends:
            return self.tokenizer.eos_token, True
        return min(ends, key=lambda token: (tail.index(token), -len(token))), False

    def _probes(self) -> Iterator[str]:
        """Conversations of plain words, rendered."""
        question, answer = Message("user", "a"), Message("assistant", "b")
        for system in ((), (Message("system", "c"),)):
            with suppress(RowError):  # some templates refuse a system message
                yield self.prompt([*system, question, answer, question])
                yield self._text([*system, question, answer])[0]

    def _extend_to_end_of_turn(self, text: str, span: Span) -> Span:
        """A marked span, made to end with its end-of-turn token."""
        start, end = span
        inside = text.rfind(self.end_of_turn, start, end)
        if inside >= 0:
            return start, inside + len(self.end_of_turn)
        rest = text[end:].lstrip()
        if rest.startswith(self.end_of_turn):
            return start, len(text) - len(rest) + len(self.end_of_turn)
        return span

    def _spans_by_prefix(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """From the end of each generation prompt to the next end-of-turn token.

        Raises:
            RowError: if the rendered previous messages are not a prefix of the text, or a message
                between two answers is not between their spans.
        """
        spans: list[Span] = []
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for i in answers:
            prefix = self.prompt(messages[:i])
            if not text.startswith(prefix):
                raise RowError(None, _not_a_prefix(prefix, text, i))
            close = text.find(self.end_of_turn, len(prefix))
            if close < 0:
                raise RowError(None, f"the template does not close message {i}")
            spans.append((len(prefix), close + len(self.end_of_turn)))
        for (i, j), ((_, end), (start, _)) in zip(pairwise(answers), pairwise(spans), strict=True):
            if any(m.content.strip() not in text[end:start] for m in messages[i + 1 : j]):
                raise RowError(
                    None,
                    f"the template does not close message {i} with {self.end_of_turn}, as it does "
                    "the last one, so its trained tokens are unknown. Split the conversation "
                    "into rows of one answer, or mark the answers in the tokenizer's chat template "
                    "with {% generation %}",
                )
        return spans


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS in front of a text.

    The ids alone do not say: without an entry for a word, some tokenizers return BOS for it.
    """
    word = tokenizer("a", add_special_tokens=False).input_ids
    return tokenizer("a").input_ids[: len(word) + 1] == [tokenizer.bos_token_id, *word]


def _require_no_powers(source: str) -> None:
    """Refuse a template that computes a power: 9**9**9 is one step that takes hours.

    Raises:
        DataError: if it does.
    """
    try:
        tokens = list(jinja2.Environment().lex(source))
    except jinja2.TemplateError:
        return  # reported when it is rendered
    if any(kind == "operator" and text == "**" for _, kind, text in tokens):
        raise DataError(
            "the tokenizer's chat template computes a power (**), which may never end. Give the "
            "tokenizer another chat template"
        )


def _not_a_prefix(prefix: str, text: str, index: int) -> str:
    """The error message: where the prompt before message `index` differs from the whole text."""
    at = next(i for i, (a, b) in enumerate(zip(prefix, text + "\0", strict=False)) if a != b)
    near = slice(max(0, at - 20), at + 20)
    return (
        f"the chat template renders the text before message {index} differently when the message "
        f"follows: {prefix[near]!r} becomes {text[near]!r}, so the trained tokens are unknown. "
        "Mark the answers in the tokenizer's chat template with {% generation %}"
    )
