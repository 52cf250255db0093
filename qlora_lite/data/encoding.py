"""Token ids and loss masks of rendered conversations and of plain text.

Text is tokenised without the special tokens that a tokenizer adds by itself. A conversation has
those that its chat template writes: no BOS, one, or one per turn (SmolLM2), as
`apply_chat_template` returns them. Its ids start with those of its first prompt (`data/pieces.py`).
Plain text gets one BOS if the tokenizer adds one, and one EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import BatchEncoding

from qlora_lite.data.control_tokens import Span
from qlora_lite.data.formats import Document
from qlora_lite.data.pieces import Pieces
from qlora_lite.data.templates import ChatTemplate, Rendered


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row, and which of them are trained. The first one never is."""

    ids: list[int]
    loss_mask: list[bool]
    num_rewritten: int = 0
    """Of the rendered conversation."""


def encode(
    template: ChatTemplate, rendered: Sequence[Rendered], loss_on_all: bool = False
) -> list[Encoded]:
    """Tokenise conversations. A token that is partly inside a trained span is trained."""
    pieces = Pieces(template.tokenizer)
    batch = template.tokenizer(
        [row.text for row in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encoded = []
    for i, row in enumerate(rendered):
        starts = [start for start, _ in row.spans if start]
        borders = pieces.borders(row.text, starts, batch, i)
        if borders or row.plain:
            tokens = pieces.encode(row.text, borders, row.plain)
            ids = tokens.ids
            mask = [any(a < end and start < b for start, end in row.spans) for a, b in tokens.chars]
        else:
            ids = batch["input_ids"][i]
            mask = _mask(batch, i, row.spans)
        if loss_on_all and row.spans:
            mask = [True] * len(ids)
        encoded.append(Encoded(ids, _without_first(mask), row.num_rewritten))
    return encoded


def _mask(batch: BatchEncoding, row: int, spans: Sequence[Span]) -> list[bool]:
    mask = [False] * len(batch["input_ids"][row])
    for start, end in spans:
        first = _first_token(batch, row, start, end)
        last = _last_token(batch, row, end)
        mask[first : last + 1] = [True] * (last + 1 - first)
    return mask


def encode_text(template: ChatTemplate, documents: Sequence[Document]) -> list[Encoded]:
    """Tokenise plain text: BOS if the tokenizer adds one, the text, EOS if the text ends here."""
    tokenizer = template.tokenizer
    batch = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    bos = [tokenizer.bos_token_id] if template.adds_bos else []
    encoded = []
    for document, text_ids in zip(documents, batch["input_ids"], strict=True):
        eos = [tokenizer.eos_token_id] if document.is_end else []
        ids = [*bos, *text_ids, *eos]
        encoded.append(Encoded(ids, _without_first([True] * len(ids))))
    return encoded


def _without_first(mask: list[bool]) -> list[bool]:
    """The first token is not trained: no token before it predicts it."""
    return [False, *mask[1:]]


def _first_token(batch: BatchEncoding, row: int, start: int, end: int) -> int:
    """The first token of a span of characters. Some characters belong to no token."""
    for char in range(start, end):
        token = batch.char_to_token(row, char)
        if token is not None:
            return token
    raise AssertionError(f"no token contains the characters {start} to {end}")


def _last_token(batch: BatchEncoding, row: int, end: int) -> int:
    """The last token of the character before `end`, which can consist of several tokens."""
    last = batch.char_to_token(row, end - 1)
    while (chars := batch.token_to_chars(row, last + 1)) is not None and chars.start < end:
        last += 1
    return last
