"""Refuse special tokens that are written in the text of a row.

A tokenizer turns the text `<|assistant|>` into the control token of that name, so a user's text
could end its own turn or start another. These are control tokens:

- the special tokens of the tokenizer (bos, eos, pad, unk and all others marked as special), and
- the markers that the chat template writes around messages, even if they are ordinary text to the
  tokenizer, such as `[INST]`.

A special token in what the model reads (a system, user or tool message) is hidden from the
template, and later encoded as plain text, if the tokenizer can do this (`split_special_tokens`).
Any other control token is refused: a marker is the same as text, and an answer or a document that
contains special tokens was probably rendered before.

A tokenizer may normalise text before it looks for special tokens, so that full-width `＜|user|＞`
becomes `<|user|>`. With such a tokenizer the token ids of the text are checked as well.

Plain text has no exception for EOS at the end of a document, because every document gets its own.
Added tokens that are not special, such as Qwen3's `<think>`, are text that a model may write.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.row_errors import RowError

FIRST_HIDDEN, LAST_HIDDEN = 0xF1000, 0xFFFFD
"""Hidden tokens are characters of a plane for private use. Texts have none."""

Span = tuple[int, int]

_MARKER = re.compile(
    r"<[|｜][^<>{}\n]{1,60}[|｜]>|\[/?[A-Z][A-Z_]+\]|<</?[A-Z]+>>|<(?:start|end)_of_\w+>|</?s>"
)
"""What templates write around messages: `<|user|>`, `[INST]`, `<<SYS>>`, `<start_of_turn>`."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens of a tokenizer, by their text."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


class ControlTokens:
    """The control tokens of a tokenizer and its chat template.

    Args:
        rendered: conversations without control tokens of their own, as the template renders them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendered: Iterable[str]) -> None:
        markers = {marker for text in rendered for marker in _MARKER.findall(text)}
        # some tokenizers pad with an ordinary word or mark, such as "!"
        tokens = {t for t in special_tokens(tokenizer) if len(t.strip()) > 2 and not t.isalnum()}
        longest_first = sorted(tokens | markers, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._tokenizer = tokenizer
        self._normalised = _normalised(tokenizer, tokens)
        self._hidden = {token: chr(FIRST_HIDDEN + i) for i, token in enumerate(sorted(tokens))}
        self._shown = {char: token for token, char in self._hidden.items()}
        self._hidden_pattern = re.compile(f"[{chr(FIRST_HIDDEN)}-{chr(LAST_HIDDEN)}]")

    def hide(self, text: str, where: str) -> str:
        """A text in which special tokens are replaced by characters that `reveal` replaces back.

        Raises:
            RowError: if it has a control token that cannot be encoded as plain text.
        """
        self._require_no_hidden(text, where)
        if self.find(text) is None:
            return text
        hidden = self._pattern.sub(lambda m: self._hidden_token(m[0]), text)
        self.require_none(hidden, where)
        return hidden

    def reveal(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span], list[Span]]:
        """The text with its tokens back, `spans` of it moved accordingly, and the spans of the
        tokens, which are plain text."""
        places = [match.start() for match in self._hidden_pattern.finditer(text)]
        if not places:
            return text, list(spans), []
        tokens = [self._shown[text[i]] for i in places]
        moved = [0, *accumulate(len(token) - 1 for token in tokens)]
        plain = [(i + m, i + m + len(t)) for i, m, t in zip(places, moved, tokens, strict=False)]

        def move(place: int) -> int:
            return place + moved[bisect_left(places, place)]

        revealed = self._hidden_pattern.sub(lambda match: self._shown[match[0]], text)
        return revealed, [(move(start), move(end)) for start, end in spans], plain

    def require_plain_answer(self, text: str, where: str) -> None:
        """Raise if what the model says contains a control token, or what could be a hidden one.

        Raises:
            RowError: with the token.
        """
        self._require_no_hidden(text, where)
        self.require_none(text, where)

    def _require_no_hidden(self, text: str, where: str) -> None:
        if match := self._hidden_pattern.search(text):
            raise RowError(
                None,
                f"{where} contains the character U+{ord(match[0]):X}, which is used here for "
                "special tokens in texts. Remove it from the text",
            )

    def _hidden_token(self, token: str) -> str:
        """The character for a token, or the token itself if it cannot be plain text."""
        if token not in self._hidden:
            return token
        plain = self._tokenizer(token, add_special_tokens=False, split_special_tokens=True)
        is_plain = self._tokenizer.convert_tokens_to_ids(token) not in plain.input_ids
        return self._hidden[token] if is_plain else token

    def find(self, text: str) -> tuple[str, int] | None:
        """The first control token in a text and its position."""
        if match := self._pattern.search(text):
            return match[0], match.start()
        if self._normalised:
            encoding = self._tokenizer(text, add_special_tokens=False, verbose=False)
            for i, token in enumerate(encoding.input_ids):
                if token in self._normalised:
                    return self._normalised[token], encoding.token_to_chars(i).start
        return None

    def require_none(self, text: str, where: str) -> None:
        """Raise if a text contains a control token.

        Raises:
            RowError: with the token and the words around it.
        """
        if found := self.find(text):
            token, start = found
            near = text[max(0, start - 20) : start + len(token) + 20]
            raise RowError(
                None,
                f"{where} contains the control token {token!r}, near {near!r}. Remove it "
                "from the text: the chat template writes control tokens, and a document gets its "
                "end token by itself",
            )


def _normalised(tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> dict[int, str]:
    """The ids of the control tokens that are looked for in normalised text, without the unknown
    token: characters that have no token become that one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return {}
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.normalized and token.content in tokens and number != tokenizer.unk_token_id
    }
