"""The held-out questions of a data set, with all their references.

Rows with the same prompt are one question: a meaning of E2E has several descriptions.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.read_rows import read_rows
from qlora_lite.data.settings import Data
from qlora_lite.data.sources import open_source
from qlora_lite.data.tokenise import CHARS_PER_TOKEN
from qlora_lite.foundation.errors import DataError

SEED = 0
"""Of the choice of questions, the same for all runs."""


@dataclass(frozen=True)
class Question:
    """A prompt and the answers that its rows give."""

    prompt: tuple[Message, ...]
    references: tuple[str, ...]

    @property
    def row(self) -> Conversation:
        """The prompt with its first reference."""
        return Conversation((*self.prompt, Message("assistant", self.references[0])))

    @property
    def text(self) -> str:
        return self.prompt[-1].content or ""


def choose_questions(data: Data, heldout: str, num: int, seed: int = SEED) -> list[Question]:
    """`num` questions of the file `heldout` in random order, none of them in `data.train`.

    Raises:
        DataError: if there are fewer.
    """
    trained = {row.messages[:-1] for row in _rows(data, data.train)}
    references: dict[tuple[Message, ...], list[str]] = {}
    for row in _rows(data, heldout):
        if row.messages[:-1] not in trained:
            references.setdefault(row.messages[:-1], []).append(row.messages[-1].content or "")
    if len(references) < num:
        raise DataError(
            f"{heldout} has {len(references)} questions that are not in {data.train}, and {num} "
            "are needed. Use --questions for fewer"
        )
    chosen = random.Random(seed).sample(list(references), num)
    return [Question(prompt, tuple(references[prompt])) for prompt in chosen]


def _rows(data: Data, name: str) -> Iterator[Conversation]:
    source = open_source(name, data.columns, CHARS_PER_TOKEN * data.max_tokens)
    for _, row in read_rows(source, data):
        assert isinstance(row, Conversation), f"{name} has plain text"
        yield row
