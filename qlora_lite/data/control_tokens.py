"""Refuse special tokens that are written in the text of a row.

A tokenizer turns the text `<|assistant|>` into the control token of that name, so a user's text
could end its own turn or start another. The rule is the same for every format: a text that comes
from a row may contain

- no special token of the tokenizer (bos, eos, pad, unk and all others marked as special), and
- no marker that the chat template writes around messages, even if it is ordinary text to the
  tokenizer, such as `[INST]`.

A tokenizer may normalise text before it looks for special tokens, so that full-width `＜|user|＞`
becomes `<|user|>`. With such a tokenizer the token ids of the text are checked as well.

Plain text has no exception for EOS at the end of a document, because every document gets its own.
Added tokens that are not special, such as Qwen3's `<think>`, are text that a model may write.
"""

import re
from collections.abc import Collection, Iterable

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.formats import RowError

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
