"""Turn all rows of a source into examples: read, render, tokenise, check, fit, count."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from qlora_lite.data.encoding import Encoded, encode, encode_text
from qlora_lite.data.examples import Examples, ExamplesBuilder
from qlora_lite.data.formats import Document
from qlora_lite.data.lengths import fit, percentile
from qlora_lite.data.messages import Conversation
from qlora_lite.data.read_rows import Item, read_rows
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.settings import Data, TooLong
from qlora_lite.data.sources import Source, open_source
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.token_display import Piece, decode_pieces
from qlora_lite.foundation.errors import DataError

CHUNK_ROWS = 1000
"""Rows that are tokenised at a time; the tokenizer runs in parallel."""
CHUNK_CHARS = 250_000
"""About how many characters are tokenised at a time, so that progress is reported several times a
second."""
CHARS_PER_TOKEN = 4
"""An estimate, to cut a .txt file into rows of about one bin. Packing evens out the error."""
MAX_DROPPED = 0.01
"""Largest share of rows that are dropped for their length if `data.too_long` is not set."""
MAX_NAMED = 5
"""Number of too long rows to name."""


@dataclass(frozen=True)
class Stats:
    """Counts of the rows and tokens of a source."""

    rows: int
    examples: int
    """Rows and pieces of rows that were kept."""
    tokens: int
    """Tokens that were kept."""
    trained_tokens: int
    dropped_rows: int
    split_rows: int
    truncated_rows: int
    lost_tokens: int
    """Tokens of dropped rows, and tokens that were cut off."""
    too_long: tuple[int, ...]
    """Numbers of the first rows that were longer than `max_tokens`."""
    rewritten_turns: int
    """Assistant messages that the chat template changed."""
    equal_rows: int
    """Rows with the same content as an earlier one, among those that were kept."""
    blank_rows: int
    """Blank records of a table, which were skipped."""
    p50: int
    """Tokens of the median row, before dropping and cutting."""
    p95: int
    longest: int

    @property
    def lost_share(self) -> float:
        return self.lost_tokens / (self.tokens + self.lost_tokens)


@dataclass(frozen=True)
class Tokenised:
    """All rows of a source as examples."""

    source: Source
    examples: Examples
    keys: list[bytes]
    """For each example a hash of the content of its row."""
    stats: Stats


class NothingTrained(DataError):
    """A row has no trained token. `pieces` are its tokens."""

    def __init__(self, message: str, pieces: list[Piece]) -> None:
        super().__init__(message)
        self.pieces = pieces


Report = Callable[[int, int | None], None]
"""Receives the number of rows that are tokenised, and at the end their total; it may raise."""


def ignore(done_rows: int, total_rows: int | None) -> None:
    """A `Report` that does nothing."""


def tokenise(
    data: Data,
    name: str,
    template: ChatTemplate,
    max_rows: int | None = None,
    report: Report = ignore,
) -> Tokenised:
    """Tokenise all rows of a file or a hub data set; `data.too_long` decides about long rows.

    `report` is called several times a second.

    Raises:
        DataError: for anything wrong with the file or a row, with its place; if a row is too long
            and the policy is `error`; or if too many rows are too long.
    """
    source = open_source(name, data.columns, CHARS_PER_TOKEN * data.max_tokens)
    collected = _Collected()
    rows = islice(read_rows(source, data), max_rows)
    report(0, None)
    for chunk in _chunks(rows):
        policy = _policy(data, chunk[0][1], source)
        for (number, item), row in zip(chunk, _encode(source, chunk, template, data), strict=True):
            _require_trainable(row, template, source, number)
            if policy == "error" and len(row.ids) > data.max_tokens:
                raise DataError(
                    f"{source.where(number)}: the row has {len(row.ids)} tokens, data.max_tokens "
                    f"is {data.max_tokens}. Raise it, or set another data.too_long"
                )
            pieces = fit(row, data.max_tokens, policy, keeps_first=template.adds_bos)
            collected.add(number, _key(item), row, pieces)
        report(len(collected.lengths), None)
    report(len(collected.lengths), len(collected.lengths))
    _limit_dropped(data, source, collected)
    examples = collected.builder.build()
    return Tokenised(
        source, examples, collected.keys, collected.stats(examples, source.num_blank())
    )


def _chunks(rows: Iterable[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """The rows in groups of at most `CHUNK_ROWS` rows and about `CHUNK_CHARS` characters."""
    chunk: list[tuple[int, Item]] = []
    num_chars = 0
    for number, item in rows:
        chunk.append((number, item))
        if isinstance(item, Document):
            num_chars += len(item.text)
        else:
            num_chars += sum(len(message.content or "") for message in item.messages)
        if len(chunk) >= CHUNK_ROWS or num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


class _Collected:
    """The rows that are kept so far, and counts of all rows."""

    def __init__(self) -> None:
        self.builder = ExamplesBuilder()
        self.keys: list[bytes] = []
        self.lengths = array("q")
        self.too_long: list[int] = []
        self.dropped = self.split = self.truncated = self.lost = self.rewritten = 0

    def add(self, number: int, key: bytes, row: Encoded, pieces: Sequence[Encoded]) -> None:
        """Add a row and the pieces of it that are kept."""
        for piece in pieces:
            self.builder.add(piece.ids, piece.loss_mask, number)
            self.keys.append(key)
        self.lengths.append(len(row.ids))
        self.rewritten += row.num_rewritten
        # pieces of a split row repeat a token, so together they are never shorter than the row
        lost = max(0, len(row.ids) - sum(len(piece.ids) for piece in pieces))
        self.lost += lost
        self.dropped += not pieces
        self.split += len(pieces) > 1
        self.truncated += len(pieces) == 1 and lost > 0
        if (lost or len(pieces) > 1) and len(self.too_long) < MAX_NAMED:
            self.too_long.append(number)

    def stats(self, examples: Examples, num_blank: int) -> Stats:
        return Stats(
            rows=len(self.lengths),
            examples=len(examples),
            tokens=examples.num_tokens,
            trained_tokens=examples.num_targets,
            dropped_rows=self.dropped,
            split_rows=self.split,
            truncated_rows=self.truncated,
            lost_tokens=self.lost,
            too_long=tuple(self.too_long),
            rewritten_turns=self.rewritten,
            equal_rows=len(self.lengths) - self.dropped - len(set(self.keys)),
            blank_rows=num_blank,
            p50=percentile(self.lengths, 50),
            p95=percentile(self.lengths, 95),
            longest=max(self.lengths),
        )


def _policy(data: Data, item: Item, source: Source) -> TooLong:
    """What to do with long rows of this kind.

    Raises:
        DataError: if it would cut off the trained end of a conversation.
    """
    if isinstance(item, Document):
        return data.too_long or "split"
    if data.too_long in ("split", "truncate"):
        raise DataError(
            f"{source.name} has conversations, and data.too_long={data.too_long} would cut off "
            "their trained end of turn. Use drop or error, or raise data.max_tokens"
        )
    return data.too_long or "drop"


def _encode(
    source: Source, chunk: Sequence[tuple[int, Item]], template: ChatTemplate, data: Data
) -> list[Encoded]:
    """Render and tokenise rows, which are all of one kind."""
    documents = [(number, item) for number, item in chunk if isinstance(item, Document)]
    if documents:
        for number, document in documents:
            _require_no_control_token(source, number, document, template)
        return encode_text(template, [document for _, document in documents])
    rendered = []
    for number, item in chunk:
        assert isinstance(item, Conversation)
        try:
            if data.loss_on == "all":
                _require_all_trained(item)
            rendered.append(template.render(item, data.reasoning))
        except RowError as error:
            raise DataError(f"{source.where(number)}: {error}") from None
    return encode(template, rendered, data.loss_on == "all")


def _require_all_trained(conversation: Conversation) -> None:
    if not all(message.is_trained for message in conversation.messages):
        raise RowError(
            "messages",
            "has a turn that is not trained, and data.loss_on=all trains all of the text. Set "
            "data.loss_on=assistant",
        )


def _require_no_control_token(
    source: Source, number: int, document: Document, template: ChatTemplate
) -> None:
    try:
        template.control_tokens.require_none(document.text, "the text")
    except RowError as error:
        if source.is_text_file:  # rows of several lines
            _, start = template.control_tokens.find(document.text) or ("", 0)
            number += document.text.count("\n", 0, start)
        raise DataError(f"{source.where(number)}: {error}") from None


def _require_trainable(row: Encoded, template: ChatTemplate, source: Source, number: int) -> None:
    """Check that a row has a trained token.

    Raises:
        NothingTrained: if it has none.
    """
    tokenizer = template.tokenizer
    if not any(row.loss_mask):
        raise NothingTrained(
            f"{source.where(number)}: no token of this row is trained. The assistant's message is "
            f"not in the text {tokenizer.decode(row.ids)!r:.300}, rendered by the chat template "
            f"{template.source!r:.300}. Correct the template",
            decode_pieces(row.ids, row.loss_mask, tokenizer),
        )


def _limit_dropped(data: Data, source: Source, collected: _Collected) -> None:
    """Raise DataError if all rows were dropped, or too many without a policy."""
    num_rows, lengths = len(collected.lengths), collected.lengths
    if data.too_long is None and collected.dropped > MAX_DROPPED * num_rows:
        raise DataError(
            f"{source.name}: {collected.dropped} of {num_rows} rows are longer than "
            f"data.max_tokens={data.max_tokens}; by default at most {MAX_DROPPED:.0%} are dropped. "
            f"99 % of the rows have at most {percentile(lengths, 99)} tokens, the longest "
            f"{max(lengths)}. Raise data.max_tokens, or set data.too_long=drop"
        )
    if collected.dropped == num_rows:
        raise DataError(
            f"{source.name}: all rows are longer than data.max_tokens={data.max_tokens}; the "
            f"median has {percentile(lengths, 50)} tokens. Raise data.max_tokens"
        )


def _key(item: Item) -> bytes:
    """A hash of the content: which rows are held out depends on it."""
    return hashlib.blake2b(repr(item).encode(), digest_size=8).digest()
