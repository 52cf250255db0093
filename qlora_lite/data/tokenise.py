"""All rows of a source as examples: read, rendered, checked, made to fit, counted."""

import difflib
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from qlora_lite.data.coloured import Piece, spell
from qlora_lite.data.examples import Examples, ExamplesBuilder
from qlora_lite.data.formats import (
    FORMATS,
    Conversation,
    Document,
    Fields,
    Format,
    RowError,
    find_format,
    with_system,
)
from qlora_lite.data.lengths import fit, percentile
from qlora_lite.data.settings import Data, TooLong
from qlora_lite.data.sources import Source, open_source
from qlora_lite.data.templates import ChatTemplate, Encoded
from qlora_lite.foundation.errors import DataError

CHUNK = 1000
"""Rows that are tokenised at a time, in parallel by the tokenizer."""
CHARS_PER_TOKEN = 4
"""How a .txt file is cut into rows of about one bin each; a guess that packing makes good."""
MAX_DROPPED = 0.01
"""Share of rows that may be dropped for their length without having been asked for."""
SHOWN = 5
"""Too long rows that are named."""

Item = Conversation | Document


@dataclass(frozen=True)
class Stats:
    """What became of the rows of a source."""

    rows: int
    examples: int
    """Rows, or pieces of rows, that are kept."""
    tokens: int
    """Tokens that are kept."""
    trained_tokens: int
    dropped_rows: int
    split_rows: int
    truncated_rows: int
    lost_tokens: int
    """Tokens of dropped rows, and those that were cut away."""
    too_long: tuple[int, ...]
    """Numbers of the first rows that were longer than `max_tokens`."""
    rewritten_turns: int
    """Assistant turns that the chat template does not repeat word for word."""
    p50: int
    """Tokens of the median row, as it was read."""
    p95: int
    longest: int

    @property
    def lost_share(self) -> float:
        """Share of all tokens that were lost."""
        return self.lost_tokens / (self.tokens + self.lost_tokens)


@dataclass(frozen=True)
class Tokenised:
    """All rows of a source."""

    source: Source
    examples: Examples
    keys: list[bytes]
    """For each example a hash of what its row says."""
    stats: Stats


class NothingTrained(DataError):
    """A row in which no token is trained; `sample` shows its tokens."""

    def __init__(self, message: str, sample: list[Piece]) -> None:
        super().__init__(message)
        self.sample = sample


def tokenise(
    data: Data, name: str, template: ChatTemplate, max_rows: int | None = None
) -> Tokenised:
    """All rows of a file or of a hub data set, made to fit as `data.too_long` says.

    Raises:
        DataError: for anything wrong with the file or a row, with its place; if a row is too long
            for the policy, or too many are.
    """
    source = open_source(name, data.columns, CHARS_PER_TOKEN * data.max_tokens)
    tally = _Tally()
    rows = islice(_read(source, data), max_rows)
    while chunk := list(islice(rows, CHUNK)):
        policy = _policy(data, chunk[0][1], source)
        for (number, item), row in zip(chunk, _encode(source, chunk, template, data), strict=True):
            _check(row, template, source, number)
            if policy == "error" and len(row.ids) > data.max_tokens:
                raise DataError(
                    f"{source.where(number)}: the row has {len(row.ids)} tokens, data.max_tokens "
                    f"is {data.max_tokens}. Raise it, or take another data.too_long"
                )
            pieces = fit(row, data.max_tokens, policy, keeps_first=template.adds_bos)
            tally.add(number, _key(item), row, pieces)
    _check_dropped(data, source, tally)
    examples = tally.builder.build()
    return Tokenised(source, examples, tally.keys, tally.stats(examples))


class _Tally:
    """The rows that are kept, and counts of those that are not."""

    def __init__(self) -> None:
        self.builder = ExamplesBuilder()
        self.keys: list[bytes] = []
        self.lengths = array("q")
        self.too_long: list[int] = []
        self.dropped = self.split = self.truncated = self.lost = self.rewritten = 0

    def add(self, number: int, key: bytes, row: Encoded, pieces: Sequence[Encoded]) -> None:
        """A row, and what is left of it."""
        for piece in pieces:
            self.builder.add(piece.ids, piece.loss_mask, number)
            self.keys.append(key)
        self.lengths.append(len(row.ids))
        self.rewritten += row.num_rewritten
        # pieces of a split row have a token in common, so they are never fewer
        lost = max(0, len(row.ids) - sum(len(piece.ids) for piece in pieces))
        self.lost += lost
        self.dropped += not pieces
        self.split += len(pieces) > 1
        self.truncated += len(pieces) == 1 and lost > 0
        if (lost or len(pieces) > 1) and len(self.too_long) < SHOWN:
            self.too_long.append(number)

    def stats(self, examples: Examples) -> Stats:
        """All counts."""
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
            p50=percentile(self.lengths, 50),
            p95=percentile(self.lengths, 95),
            longest=max(self.lengths),
        )


def _read(source: Source, data: Data) -> Iterator[tuple[int, Item]]:
    """Rows of a source as conversations or documents.

    Raises:
        DataError: with file, line and field of a row that is neither.
    """
    names = data.fields or {}
    seen: set[str] = set()
    chosen: Format | None = None
    for number, row in source.rows():
        if source.is_text_file:
            yield number, Document(row["text"], row["is_end"])
            continue
        if chosen is None:
            chosen = _choose_format(data, row, source, number)
        seen.update(name for name in names if names[name] in row)
        try:
            item = chosen.read(Fields(row, names, data.prompt))
        except RowError as error:
            raise DataError(f"{source.where(number)}: {error}") from None
        yield number, with_system(item, data.system) if isinstance(item, Conversation) else item
    if not source.is_text_file and (lost := sorted(names.keys() - seen)):
        raise DataError(
            f"data.fields says that {lost[0]} is the field {names[lost[0]]!r}, and no row of "
            f"{source.name} has it. Name the field that it is, or leave {lost[0]} out"
        )


def _choose_format(data: Data, row: dict[str, object], source: Source, number: int) -> Format:
    has_prompt = data.prompt is not None
    if has_prompt and data.format not in ("auto", "completion"):
        raise DataError(
            f"data.prompt makes rows of the format completion, and data.format is {data.format}; "
            "remove one of the two"
        )
    is_auto = data.format == "auto"
    kind = find_format(row, data.fields or {}, has_prompt) if is_auto else data.format
    if kind is not None:
        return FORMATS[kind]
    known = "; ".join(f"{k}: {', '.join(f.needs)}" for k, f in FORMATS.items())
    absent = [name for name in (data.fields or {}).values() if name not in row]
    if absent:
        near = difflib.get_close_matches(absent[0], row, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{source.where(number)}: there is no field {absent[0]!r}, which data.fields names."
            f"{hint} There are {', '.join(map(repr, row))}"
        )
    raise DataError(
        f"{source.where(number)}: what a row is cannot be told from its fields "
        f"{', '.join(map(repr, row))}. Needed are those of one format ({known}). Name yours with "
        'data.fields, such as \'{"prompt": "question", "completion": "answer"}\'; for a csv or tsv '
        "file without a header, of which this shows the first line, also with data.columns"
    )


def _policy(data: Data, item: Item, source: Source) -> TooLong:
    """The policy for this kind of row.

    Raises:
        DataError: if it would cut the trained end of a conversation away.
    """
    if isinstance(item, Document):
        return data.too_long or "split"
    if data.too_long in ("split", "truncate"):
        raise DataError(
            f"{source.name} holds conversations, and data.too_long={data.too_long} would cut their "
            "trained end of turn away. Take drop or error, or raise data.max_tokens"
        )
    return data.too_long or "drop"


def _encode(
    source: Source, chunk: Sequence[tuple[int, Item]], template: ChatTemplate, data: Data
) -> list[Encoded]:
    """Token ids and loss masks of rows of one kind."""
    documents = [item for _, item in chunk if isinstance(item, Document)]
    if documents:
        return template.encode_text(documents)
    rendered = []
    for number, item in chunk:
        assert isinstance(item, Conversation)
        try:
            rendered.append(template.render(item))
        except RowError as error:
            raise DataError(f"{source.where(number)}: {error}") from None
    return template.encode(rendered, data.loss_on == "all")


def _check(row: Encoded, template: ChatTemplate, source: Source, number: int) -> None:
    """Something is trained, and there is at most one BOS.

    Raises:
        DataError: if not.
    """
    tokenizer = template.tokenizer
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id and row.ids.count(bos) > 1:
        raise DataError(
            f"{source.where(number)}: the row has {row.ids.count(bos)} BOS tokens "
            f"({tokenizer.bos_token!r}), at most one is right: remove it from the text or from "
            "the chat template"
        )
    if not any(row.loss_mask):
        raise NothingTrained(
            f"{source.where(number)}: nothing in this row is trained; what the assistant says is "
            f"not found in its text {tokenizer.decode(row.ids)!r:.300}, made by the chat template "
            f"{template.source!r:.300}. Correct the template",
            spell(row.ids, row.loss_mask, tokenizer),
        )


def _check_dropped(data: Data, source: Source, tally: _Tally) -> None:
    num_rows, lengths = len(tally.lengths), tally.lengths
    if data.too_long is None and tally.dropped > MAX_DROPPED * num_rows:
        raise DataError(
            f"{source.name}: {tally.dropped} of {num_rows} rows are longer than "
            f"data.max_tokens={data.max_tokens}, and more than {MAX_DROPPED:.0%} are not dropped "
            f"unasked. 99 % of the rows have at most {percentile(lengths, 99)} tokens, the longest "
            f"{max(lengths)}. Raise data.max_tokens, or take data.too_long=drop"
        )
    if tally.dropped == num_rows:
        raise DataError(
            f"{source.name}: all rows are longer than data.max_tokens={data.max_tokens}; the "
            f"median has {percentile(lengths, 50)} tokens. Raise data.max_tokens"
        )


def _key(item: Item) -> bytes:
    """Equal for rows that say the same."""
    return hashlib.blake2b(repr(item).encode(), digest_size=8).digest()
