"""Rows token by token, with the trained tokens marked."""

from qlora_lite.data.token_display import TRAINED, Piece, bracketed, coloured, decode_pieces
from tests.data.metaspace import metaspace_tokenizer
from tests.tiny import tiny_tokenizer


def test_trained_tokens_have_their_own_style():
    text = coloured([Piece("ask", False), Piece("say", True), Piece("end", True)])
    assert text.plain == "asksayend"
    assert [(s.start, s.end) for s in text.spans if TRAINED in str(s.style)] == [(3, 6), (6, 9)]


def test_trained_text_is_in_brackets_without_colours():
    pieces = [Piece("ask", False), Piece("say", True), Piece("end", True)]
    assert bracketed(pieces) == "ask[[sayend]]"
    assert bracketed([*pieces, Piece("ask", False)]) == "ask[[sayend]]ask"


def test_a_space_that_a_tokenizer_drops_at_the_start_is_shown():
    tokenizer = metaspace_tokenizer()
    ids = tokenizer("say two apples left", add_special_tokens=False).input_ids
    assert len(ids) > 2
    pieces = decode_pieces(ids, [True] * len(ids), tokenizer)
    assert "".join(piece.text for piece in pieces) == "say two apples left"


def test_tokens_of_one_character_are_joined_within_a_trained_span():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("🍎").input_ids[1:]
    assert len(ids) > 1
    assert [p.text for p in decode_pieces(ids, [True] * len(ids), tokenizer)] == ["🍎"]
    assert [
        p.is_trained for p in decode_pieces(ids, [False] + [True] * (len(ids) - 1), tokenizer)
    ] == [
        False,
        True,
    ]
