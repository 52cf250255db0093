"""The data that a run would see: some rows token by token, row lengths, rows cut or dropped."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.examples import Example, Examples
from qlora_lite.data.load import PreparedData
from qlora_lite.data.sources import Source
from qlora_lite.data.token_display import Piece, decode_pieces
from qlora_lite.data.tokenise import Stats


@dataclass(frozen=True)
class PreviewRow:
    """One row, token by token."""

    where: str
    """`train.jsonl, line 17`"""
    pieces: list[Piece]
    num_tokens: int
    num_trained: int


@dataclass(frozen=True)
class LengthBar:
    """Number of rows with `shortest` to `longest` tokens."""

    shortest: int
    longest: int
    count: int


@dataclass(frozen=True)
class Preview:
    """Everything that the `preview` command shows."""

    rows: list[PreviewRow]
    num_train: int
    num_heldout: int
    train_tokens: int
    trained_tokens: int
    num_repeated: int
    """Training rows that were left out because the held-out file contains them."""
    end_of_turn: str
    template: str
    """Which chat template it is."""
    stats: Stats
    heldout_stats: Stats | None
    too_long: list[str]
    """Places of the first rows that were cut or dropped."""
    lengths: list[LengthBar]


def preview(prepared: PreparedData, num_rows: int = 3) -> Preview:
    """The first training rows, and counts over all rows."""
    train, template = prepared.train, prepared.template
    return Preview(
        rows=[
            preview_row(train[i], prepared.train_source, template.tokenizer)
            for i in range(min(num_rows, len(train)))
        ],
        num_train=len(train),
        num_heldout=len(prepared.heldout),
        train_tokens=train.num_tokens,
        trained_tokens=train.num_targets,
        num_repeated=prepared.num_repeated,
        end_of_turn=template.end_of_turn,
        template=_template(prepared),
        stats=prepared.stats,
        heldout_stats=prepared.heldout_stats,
        too_long=[prepared.train_source.where(number) for number in prepared.stats.too_long],
        lengths=length_bars(train),
    )


def _template(prepared: PreparedData) -> str:
    if prepared.template_name is not None:
        return f"the chat template {prepared.template_name}"
    return "the plain template" if prepared.template.is_plain else "the tokenizer's chat template"


def preview_row(example: Example, source: Source, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """One row, decoded token by token."""
    mask = example.loss_mask.tolist()
    return PreviewRow(
        source.where(example.row),
        decode_pieces(example.ids.tolist(), mask, tokenizer),
        len(mask),
        sum(mask),
    )


def length_bars(examples: Examples, num_bars: int = 10) -> list[LengthBar]:
    """A histogram of row lengths, in bars of equal width."""
    lengths = examples.lengths
    width = -(-max(lengths) // num_bars)
    counts = [0] * num_bars
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [LengthBar(i * width + 1, (i + 1) * width, n) for i, n in enumerate(counts)]
