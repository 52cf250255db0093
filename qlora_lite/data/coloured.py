"""The text of tokens, and which of them are trained: for a person to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

TRAINED = "bold green"
READ = "dim"


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of a few that only together make whole characters."""

    text: str
    is_trained: bool


def spell(
    ids: Sequence[int], loss_mask: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """Token by token what a row says. Tokens that are parts of one character are joined.

    A token is decoded behind the one before it: some tokenizers drop a space at the beginning.
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
    """A row for the terminal: trained tokens stand out, every second one underlined."""
    text = Text()
    for i, piece in enumerate(pieces):
        style = TRAINED if piece.is_trained else READ
        text.append(piece.text, f"{style} underline" if i % 2 else style)
    return text


def bracketed(pieces: Sequence[Piece]) -> str:
    """The same without colour: what is trained stands between [[ and ]]."""
    text = ""
    inside = False
    for piece in pieces:
        if piece.is_trained != inside:
            text += "]]" if inside else "[["
            inside = piece.is_trained
        text += piece.text
    return text + "]]" * inside
