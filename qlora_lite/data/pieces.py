"""Tokenise a row in pieces, where one pass over its text would give other tokens than a model sees.

- The border of a prompt and an answer: a token that merges across it, or another split of the
  prompt's last characters, would give ids that do not start with those of the prompt.
- Special tokens that are plain text: the text between two real special tokens is encoded with
  `split_special_tokens`.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from transformers import BatchEncoding, PreTrainedTokenizerBase

from qlora_lite.data.control_tokens import Span, special_tokens

ANCHORS = ("\n", "a", "!")
"""Characters that are put in front of a piece: at the start of a text, some tokenizers add a space.
The first one that does not merge with the piece is used."""

KNOWN_TAILS = 1024
"""Tails of prompts whose tokens are kept: most rows of a data set have the same."""


@dataclass(frozen=True)
class Tokens:
    """Token ids, and for each the characters that it encodes."""

    ids: list[int]
    chars: list[Span]


class Pieces:
    """Tokenises rows in pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(special_tokens(tokenizer), key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._tail_ids = lru_cache(KNOWN_TAILS)(self._ids)

    def borders(
        self, text: str, starts: Sequence[int], batch: BatchEncoding, row: int
    ) -> list[int]:
        """Those starts of answers at which the text has to be split.

        Args:
            batch: has the whole text as its row `row`.
        """
        found = []
        special = [0, *(match.start() for match in self._special.finditer(text))]
        for start in starts:
            tail = special[bisect_left(special, start, lo=1) - 1]
            first = batch.char_to_token(row, tail)
            last = batch.char_to_token(row, start)
            whole = batch["input_ids"][row][first:last]
            if first is None or last is None or self._tail_ids(text[tail:start]) != whole:
                found.append(start)
        return found

    def encode(self, text: str, borders: Sequence[int], plain: Sequence[Span]) -> Tokens:
        """The tokens of a text that is split at `borders`, and in which `plain` spans have no
        special tokens."""
        stretches = self._plain_stretches(text, plain)
        starts = {0, *(start for start, _ in stretches if self._restarts)}
        cuts = sorted({0, *borders, *(place for span in stretches for place in span), len(text)})
        ids: list[int] = []
        chars: list[Span] = []
        for start, end in pairwise(cuts):
            is_plain = any(first <= start < last for first, last in stretches)
            tokens = self._piece(text[start:end], is_start=start in starts, is_plain=is_plain)
            ids += tokens.ids
            chars += [(start + a, start + b) for a, b in tokens.chars]
        return Tokens(ids, chars)

    def _plain_stretches(self, text: str, plain: Sequence[Span]) -> list[Span]:
        """The texts between real special tokens that contain plain ones."""
        real = [
            match.span()
            for match in self._special.finditer(text)
            if not any(start < match.end() and match.start() < end for start, end in plain)
        ]
        edges = [(0, 0), *real, (len(text), len(text))]
        between = [(a[1], b[0]) for a, b in pairwise(edges)]
        return [s for s in between if any(s[0] <= start and end <= s[1] for start, end in plain)]

    @cached_property
    def _restarts(self) -> bool:
        """Whether the text after a special token is encoded as the start of a text. Llama 2's
        tokenizer adds a space to both."""
        token = min(special_tokens(self._tokenizer), default="")
        return self._ids(f"{token}a")[1:] == self._ids("a")

    def _piece(self, text: str, *, is_start: bool, is_plain: bool) -> Tokens:
        if is_start:
            return self._tokens(text, is_plain)
        for anchor in ANCHORS:
            tokens = self._tokens(anchor + text, is_plain)
            num = sum(start < len(anchor) for start, _ in tokens.chars)
            if all(end <= len(anchor) for _, end in tokens.chars[:num]):
                moved = [(a - len(anchor), b - len(anchor)) for a, b in tokens.chars[num:]]
                return Tokens(tokens.ids[num:], moved)
        return self._tokens(text, is_plain)

    def _tokens(self, text: str, is_plain: bool) -> Tokens:
        found = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=is_plain,
            verbose=False,
        )
        return Tokens(found["input_ids"], found["offset_mapping"])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
