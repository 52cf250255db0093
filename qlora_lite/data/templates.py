"""A conversation as token ids, and which of them are trained.

The text comes from the tokenizer's own chat template, whole, and is tokenised whole, without the
special tokens that a tokenizer adds by itself (the template writes its own): what the model will
be prompted with, and never a second BOS. What the assistant says is found in that text:

- where the template marks it with {% generation %}, there;
- otherwise from the end of the earlier messages, rendered with the generation prompt, up to and
  with the next end of turn. That rendering must be the beginning of the whole text.

The token that ends a turn is read off the template: the first special token after the assistant's
words. Every row ends with it, trained, and what a template writes after the last one is left away,
since generation stops there. A template that writes none gets the tokenizer's eos at the end.

A tokenizer without a chat template gets a plain one that needs no new tokens: what the assistant
says is followed by eos, any other message by a line break.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jinja2
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_lite.data.formats import Conversation, Document, Message, RowError
from qlora_lite.foundation.errors import DataError

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + '\n' }}{% endif %}"
    "{% endfor %}"
)

# A template that writes today's date would give other tokens tomorrow, and a run could not resume.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the characters of it that the assistant says."""

    text: str
    spans: list[Span]
    num_rewritten: int = 0
    """Assistant turns that the template does not repeat word for word: it may drop reasoning."""


@dataclass(frozen=True)
class Encoded:
    """A row's token ids, and for each whether it is trained; the first never is."""

    ids: list[int]
    loss_mask: list[bool]
    num_rewritten: int = 0


class ChatTemplate:
    """A tokenizer with its chat template, or with the plain one.

    Raises:
        DataError: if the tokenizer cannot say which characters a token covers, has no eos, or its
            template fails on a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"got a {type(tokenizer).__name__}; a tokenizer with a tokenizer.json is needed, "
                "which tells the characters of every token. Take a base that brings one"
            )
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has no eos token; set eos_token in its configuration")
        self.tokenizer = tokenizer
        self.adds_bos = tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
        self.is_plain = tokenizer.chat_template is None
        self.source = self._plain() if self.is_plain else tokenizer.get_chat_template()
        self.has_marks = re.search(r"{%-?\s*generation\s*-?%}", self.source) is not None
        self.end_of_turn, self.appends_end = self._find_end_of_turn()

    @property
    def end_of_turn_id(self) -> int:
        """The token at which generation has to stop."""
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers."""
        return self._text(messages, add_generation_prompt=True)[0]

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation up to its last end of turn, and what of it is trained.

        Raises:
            RowError: if the template refuses it, or what the assistant says cannot be told.
        """
        messages = conversation.messages
        self._refuse_markers(messages)
        text, marked = self._text(messages)
        if self.appends_end:
            text = text.rstrip() + self.end_of_turn
        if self.has_marks:
            spans = [self._with_end(text, span) for span in marked]
        else:
            spans = self._spans_by_prefix(text, messages)
        if not any(text[start:end].removesuffix(self.end_of_turn).strip() for start, end in spans):
            return Rendered(text, [])
        if not text[: spans[-1][1]].endswith(self.end_of_turn):
            raise RowError(None, f"the template does not close the answer with {self.end_of_turn}")
        said = "\n".join(text[start:end] for start, end in spans)
        contents = [m.content.strip() for m in messages if m.role == "assistant"]
        num_rewritten = sum(content not in said for content in contents)
        return Rendered(text[: spans[-1][1]], spans, num_rewritten)

    def encode(self, rendered: Sequence[Rendered], loss_on_all: bool = False) -> list[Encoded]:
        """Token ids and loss masks of many conversations.

        A token that lies across the border of a span is trained: its part inside has to be said.
        """
        batch = self.tokenizer(
            [row.text for row in rendered], add_special_tokens=False, verbose=False
        )
        encoded = []
        for i, row in enumerate(rendered):
            ids = batch["input_ids"][i]
            mask = [loss_on_all and bool(row.spans)] * len(ids)
            for start, end in row.spans:
                first = _token_at(batch, i, start, end)
                last = batch.char_to_token(i, end - 1)
                mask[first : last + 1] = [True] * (last + 1 - first)
            encoded.append(Encoded(ids, _without_first(mask), row.num_rewritten))
        return encoded

    def encode_text(self, documents: Sequence[Document]) -> list[Encoded]:
        """Plain text: BOS where the tokenizer writes one, the text, eos where it ends."""
        batch = self.tokenizer(
            [document.text for document in documents], add_special_tokens=False, verbose=False
        )
        bos = [self.tokenizer.bos_token_id] if self.adds_bos else []
        encoded = []
        for document, ids in zip(documents, batch["input_ids"], strict=True):
            end = [self.tokenizer.eos_token_id] if document.is_end else []
            whole = [*bos, *ids, *end]
            encoded.append(Encoded(whole, _without_first([True] * len(whole))))
        return encoded

    def _plain(self) -> str:
        return "{{ bos_token }}" + PLAIN_TEMPLATE if self.adds_bos else PLAIN_TEMPLATE

    def _text(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """What the template makes of messages, and the spans that it marks."""
        dated = "strftime_now" in self.source
        try:
            texts, marks = render_jinja_template(
                conversations=[[{"role": m.role, "content": m.content} for m in messages]],
                chat_template=FIXED_DATE + self.source if dated else self.source,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise RowError(None, f"the chat template refuses these messages: {error}") from None
        return texts[0], [tuple(span) for span in marks[0]] if self.has_marks else []

    def _find_end_of_turn(self) -> tuple[str, bool]:
        """The token that closes an answer, and whether the template leaves it to us."""
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
                f"the tokenizer's chat template leaves out what the assistant says: a question and "
                f"an answer become {text!r}. Give the tokenizer a chat template for conversations"
            )
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        special |= set(self.tokenizer.all_special_tokens)
        ends = [token for token in special if token.strip() and token in tail]
        if not ends:
            return self.tokenizer.eos_token, True
        return min(ends, key=lambda token: (tail.index(token), -len(token))), False

    def _refuse_markers(self, messages: Sequence[Message]) -> None:
        """Text that would be tokenised as the end of a turn or as a second BOS."""
        markers = [self.end_of_turn, self.tokenizer.bos_token]
        for i, message in enumerate(messages):
            for marker in markers:
                if marker and marker in message.content:
                    raise RowError(
                        None,
                        f"message {i} holds {marker!r}, which the template writes itself. "
                        "Remove it from the text",
                    )

    def _with_end(self, text: str, span: Span) -> Span:
        """A marked span up to and with its end of turn, whether or not the mark includes it."""
        start, end = span
        inside = text.rfind(self.end_of_turn, start, end)
        if inside >= 0:
            return start, inside + len(self.end_of_turn)
        behind = text[end:].lstrip()
        if behind.startswith(self.end_of_turn):
            return start, len(text) - len(behind) + len(self.end_of_turn)
        return span

    def _spans_by_prefix(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """From the end of each generation prompt to the next end of turn.

        Raises:
            RowError: if the rendered earlier messages are not the beginning of the text, or what
                lies between two answers is not what lies between them in the conversation.
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
                    "the last one, so what is trained in it cannot be told. Split the "
                    "conversation into rows of one answer, or mark the answers in the "
                    "tokenizer's chat template with {% generation %}",
                )
        return spans


def _without_first(mask: list[bool]) -> list[bool]:
    """Nothing comes before the first token to predict it from."""
    return [False, *mask[1:]]


def _token_at(batch: BatchEncoding, row: int, start: int, end: int) -> int:
    """The token that holds the first character of a span which any token holds."""
    for char in range(start, end):
        token = batch.char_to_token(row, char)
        if token is not None:
            return token
    raise AssertionError(f"no token holds the characters {start} to {end}")


def _not_a_prefix(prefix: str, text: str, index: int) -> str:
    at = next(i for i, (a, b) in enumerate(zip(prefix, text + "\0", strict=False)) if a != b)
    near = slice(max(0, at - 20), at + 20)
    return (
        f"the chat template writes what comes before message {index} differently once the message "
        f"is there: {prefix[near]!r} becomes {text[near]!r}, so what is trained cannot be told. "
        "Mark the answers in the tokenizer's chat template with {% generation %}"
    )
