"""Compose the text of a conversation turn by turn, and find what the model says in it.

For every trained answer, the prompt is the rendering of the messages before it, with the generation
prompt; what the model has to say is the rest of the rendering in which the answer is the last
message. A row is the first prompt and, in turn, what the model says and the text up to the end of
the next prompt. For most templates this is the rendering of the whole conversation. Some templates
write an answer differently once other messages follow:

- Qwen3 writes reasoning, or an empty <think></think>, only before the last answer. Here every
  trained answer has the form in which the model has to say it.
- gpt-oss ends the last answer with <|return|> and others with <|end|>. Each keeps its own end.

The text between an answer and the next prompt is the common end of renderings in which the answer
is replaced by unlike words, so neither a literal prefix nor a known end token is needed.

If the prompt is not a prefix of the answer's rendering, another prompt of the template is tried:
with enable_thinking, as the answer has reasoning or not. Otherwise there are two cases:

- The prompt ends in <think>, as that of DeepSeek-R1. The thought is put there, or an empty one,
  because the model has to close it before it can answer.
- The template writes earlier messages in another form once there is an answer: gpt-oss leaves out
  the reasoning before a tool call. The row has the form of the prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.control_tokens import special_tokens
from qlora_lite.data.jinja_templates import JinjaTemplate, Span
from qlora_lite.data.messages import Conversation, Message, ToolCall
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.template_input import ANSWER, OPEN_THOUGHT, QUESTION, TemplateInput
from qlora_lite.foundation.errors import DataError

UNLIKE = ("qzmv", "7XK0")
"""Words without a common start or end."""

LONGEST_END = 1000
"""Characters of what a template writes between what a model chooses and the end of its turn."""

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Ends:
    """How a template ends an answer."""

    after_answer: str
    """The special tokens after the last answer. If the template writes none, the one that starts
    the next message: there the model stops."""
    after_call: str
    """The same after a tool call."""
    num_tokens: int
    """Of `after_answer`."""
    are_written: bool
    """Whether the template writes them after the last answer."""
    rest: str
    """What the template writes after the end of the last answer: it is cut off."""
    last_token: str
    """At which generation stops."""


class Turns:
    """The turns of a chat template.

    Raises:
        DataError: if the template fails on a question and an answer, or leaves the answer out.
    """

    def __init__(self, template: JinjaTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = template
        self.input = TemplateInput(template)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        tokens = {token for token in added | special_tokens(tokenizer) if token.strip()}
        self._tokens = tuple(sorted(tokens, key=lambda token: (-len(token), token)))
        self._special = "|".join(map(re.escape, self._tokens)) or r"(?!)"
        self.ends = self._find_ends(tokenizer.eos_token)

    def text(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        *,
        prompt: bool = False,
        **switches: bool,
    ) -> str:
        """Messages as the template renders them; with `prompt`, up to where the model answers."""
        return self._template.render(
            self.input.of(tuple(messages)), tools, add_generation_prompt=prompt, **switches
        )[0]

    def marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered conversation, and the spans that the template marks, without the generation
        prompt (SmolLM3 marks <|im_start|>assistant, too) and with the end of the turn."""
        text, spans = self._template.render(
            self.input.of(conversation.messages), conversation.tools
        )
        if not self.ends.are_written:
            text = text.rstrip() + self.ends.after_answer
        return text, [self._answer_in(text, span) for span in spans]

    def compose(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation up to the end of its last trained answer, and the spans of
        the trained answers with their ends.

        Raises:
            RowError: if an answer is not found, or not closed.
        """
        messages, tools = conversation.messages, conversation.tools
        trained = [i for i, m in enumerate(messages) if m.role == "assistant" and m.is_trained]
        text = ""
        spans: list[Span] = []
        last: _Turn | None = None
        for i in trained:
            turn = self._turn(messages, i, tools)
            if last is None:
                text = turn.prompt
            else:
                said, between = self._continued(messages, last, turn, tools)
                text = text[: spans[-1][0]] + said
                spans[-1] = (spans[-1][0], len(text))
                text += between
            spans.append((len(text), len(text) + len(turn.said)))
            text += turn.said
            last = turn
        return text, spans

    def _turn(self, messages: Sequence[Message], index: int, tools: Tools) -> "_Turn":
        """The prompt of an answer, and what the model says after it."""
        before, message = messages[:index], messages[index]
        whole = self.text(messages[: index + 1], tools)
        prompt = self.text(before, tools, prompt=True)
        switches: dict[str, bool] = {}
        if not whole.startswith(prompt):
            switches = {"enable_thinking": bool(message.thought)}
            other = self.text(before, tools, prompt=True, **switches)
            if not whole.startswith(other):
                return self._turn_of_another_text(before, message, tools, whole, prompt)
            prompt = other
        return _Turn(index, prompt, self._closed(whole[len(prompt) :], message, index), switches)

    def _turn_of_another_text(
        self, before: Sequence[Message], message: Message, tools: Tools, whole: str, prompt: str
    ) -> "_Turn":
        """An answer whose rendering does not start with the prompt.

        Either the prompt ends in <think>, and the template does not write it; or the template
        writes the messages before in another form, but the same start of the answer.
        """
        plain = [self.text([*before, Message("assistant", word)], tools) for word in UNLIKE]
        index, shared = len(before), len(_common_start([prompt, *plain]))
        if OPEN_THOUGHT.fullmatch(prompt[shared:]) and whole.startswith(prompt[:shared]):
            answer = whole[shared:].lstrip("\n")
            opened = OPEN_THOUGHT.match(answer)  # with another line break than in the prompt
            said = answer[opened.end() :] if opened else f"{message.thought}\n</think>\n\n{answer}"
            return _Turn(index, prompt, self._closed(said, message, index))
        starts = [match.start() for match in re.finditer(self._special, prompt)]
        header = prompt[starts[-1] :] if starts else prompt
        answer_start = len(_common_start([whole, *plain]))
        header_end = whole.rfind(header, 0, answer_start) + len(header)
        is_found = header in whole[:answer_start]
        if not is_found or not self._opening.startswith(whole[header_end:answer_start]):
            raise RowError(None, _not_a_prefix(prompt, whole, index))
        return _Turn(index, prompt, self._closed(whole[header_end:], message, index))

    def _closed(self, said: str, message: Message, index: int) -> str:
        """What the model says, up to its end."""
        if not self.ends.are_written:
            return said.rstrip() + (
                self.ends.after_call if message.tool_calls else self.ends.after_answer
            )
        rest = self.ends.rest
        said = said.removesuffix(rest) if rest and said.endswith(rest) else said.rstrip()
        if not said.endswith(self._tokens):
            raise RowError(None, f"the template does not close message {index}")
        return said

    def _continued(
        self, messages: Sequence[Message], turn: "_Turn", following: "_Turn", tools: Tools
    ) -> tuple[str, str]:
        """A turn as it is said when other messages follow, and the text up to the next prompt."""
        if following.prompt.startswith(turn.prompt + turn.said):
            return turn.said, following.prompt[len(turn.prompt + turn.said) :]
        replaced = []
        for word in UNLIKE:
            changed = _with_word(messages[turn.index], word)
            before = [*messages[: turn.index], changed, *messages[turn.index + 1 : following.index]]
            replaced.append(self.text(before, tools, prompt=True, **following.switches))
        tail = _common_end([following.prompt, *replaced])
        longest = min(len(tail), len(turn.said), LONGEST_END)
        shared = max(k for k in range(longest + 1) if turn.said.endswith(tail[:k]))
        if shared:
            return turn.said, tail[shared:]
        own = re.search(f"(?:{self._special}){{{self.ends.num_tokens}}}\\Z", turn.said)
        new = re.match(f"(?:{self._special}){{{self.ends.num_tokens}}}", tail)
        if own is None or new is None:
            raise RowError(None, f"the template does not close message {turn.index}")
        return turn.said[: own.start()] + new[0], tail[new.end() :]

    def _find_ends(self, eos: str) -> Ends:
        """The special tokens after an answer, from a question and an answer."""
        question, answer = Message("user", QUESTION), Message("assistant", ANSWER)
        try:
            text = self.text([question, answer])
        except RowError as error:
            raise DataError(
                f"the tokenizer's chat template fails on a question and an answer: {error}"
            ) from None
        asked, found, tail = text.rpartition(ANSWER)
        if not found:
            raise DataError(
                "the tokenizer's chat template leaves out the assistant's message: it renders a "
                f"question and an answer as {text!r}. Give the tokenizer a chat template for "
                "conversations"
            )
        prompt = self.text([question], prompt=True)
        self._opening = asked.removeprefix(prompt) if asked.startswith(prompt) else ""
        # a template that always writes the generation prompt writes it after the answer, too
        is_always_prompt = text == self.text([question, answer], prompt=True)
        run = re.search(f"(?:{self._special})" + ("" if is_always_prompt else "+"), tail)
        if run:
            tokens = re.findall(self._special, run[0])
            end = tail[: run.end()].lstrip()
            return Ends(end, end, len(tokens), True, tail[run.end() :], tokens[-1])
        following = self._start_after([question, answer], Message("user", QUESTION))
        called = Message("assistant", None, tool_calls=(ToolCall("call", {}, "123456789"),))
        result = Message("tool", QUESTION, tool_call_id="123456789", name="call")
        after_call = self._start_after([question, called], result)
        end = following or eos
        return Ends(end, after_call or end, 1, False, "", end)

    def _start_after(self, messages: list[Message], following: Message) -> str | None:
        """The special token that starts a message directly after these, if one does."""
        try:
            before = self.text(messages).rstrip()
            text = self.text([*messages, following])
        except RowError:
            return None
        start = re.match(self._special, text[len(before) :].lstrip())
        return start[0] if start and text.startswith(before) else None

    @cached_property
    def _header(self) -> str:
        """The generation prompt."""
        question = [Message("user", QUESTION)]
        return self.text(question, prompt=True).removeprefix(self.text(question))

    def _answer_in(self, text: str, span: Span) -> Span:
        """A marked span, made to start after the generation prompt and to end with its turn."""
        start, end = span
        width = len(self._header)
        header = text.find(self._header, max(0, start - width), min(start + width, end))
        start = max(start, header + width)
        token = self.ends.last_token
        inside = text.rfind(token, start, end)
        if inside >= 0:
            return start, inside + len(token)
        rest = text[end:].lstrip()
        ends = re.match(f"(?:{self._special}){{{self.ends.num_tokens}}}", rest)
        return start, len(text) - len(rest) + ends.end() if ends else end


@dataclass(frozen=True)
class _Turn:
    index: int
    prompt: str
    said: str
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Variables of the template with which the prompt was made."""


def _with_word(message: Message, word: str) -> Message:
    """An answer in which all that a model chooses is this word."""
    calls = tuple(replace(call, arguments={word: word}) for call in message.tool_calls)
    content = None if message.content is None else word
    return replace(message, content=content, reasoning=None, tool_calls=calls)


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # in the order of the alphabet, the most unlike ones
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))]


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def _not_a_prefix(prompt: str, text: str, index: int) -> str:
    """The error message: where the prompt before message `index` differs from the whole text."""
    at = len(_common_start([prompt, text]))
    near = slice(max(0, at - 20), at + 20)
    return (
        f"the chat template renders the text before message {index} differently when the message "
        f"follows: {prompt[near]!r} becomes {text[near]!r}, so the trained tokens are unknown. "
        "Mark the answers in the tokenizer's chat template with {% generation %}"
    )
