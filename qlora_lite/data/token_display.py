"""Show a row token by token, with the trained tokens marked: for the preview and for errors."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qlora_lite.foundation.console import visible

TRAINED = "bold green"
NOT_TRAINED = "dim"


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several tokens that together encode one character."""

    text: str
    is_trained: bool


def decode_pieces(
    ids: Sequence[int], loss_mask: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """The text of each token. Tokens that are parts of one character are joined.

    Each token is decoded together with the one before it, because some tokenizers drop a space at
    the start of the text.
    """
    pieces = []
    before: list[int] = []
    pending: list[int] = []
    for i, (token, is_trained) in enumerate(zip(ids, loss_mask, strict=True)):
        pending.append(token)
        text = tokenizer.decode([*before, *pending])[len(tokenizer.decode(before)) :]
        is_border = i + 1 == len(ids) or loss_mask[i + 1] != is_trained
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole or is_border:
            pieces.append(Piece(text, is_trained))
            before, pending = (pending if is_whole else []), []
    return pieces


def coloured(pieces: Sequence[Piece]) -> Text:
    """For a terminal: trained tokens are green, every second token is underlined."""
    text = Text()
    for i, piece in enumerate(pieces):
        style = TRAINED if piece.is_trained else NOT_TRAINED
        text.append(visible(piece.text), f"{style} underline" if i % 2 else style)
    return text


def bracketed(pieces: Sequence[Piece]) -> str:
    """Without colours: trained text is between [[ and ]]."""
    text = ""
    inside = False
    for piece in pieces:
        if piece.is_trained != inside:
            text += "]]" if inside else "[["
            inside = piece.is_trained
        text += visible(piece.text)
    return text + "]]" * inside
