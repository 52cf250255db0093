"""What a recipe says about its data."""

import difflib
import json
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from qlora_lite.foundation.settings import Settings

TooLong = Literal["error", "drop", "split", "truncate"]
LossOn = Literal["assistant", "all"]

FIELDS = ("messages", "instruction", "input", "output", "prompt", "completion", "text")
"""What a row's fields are called in the formats."""


def _from_json(value: Any) -> Any:
    """A mapping may come as the JSON text of one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'JSON is needed, such as {{"prompt": "question"}}, and this is none: {error}'
        ) from None


class Data(Settings):
    """Which rows are read, what they mean, and how they are laid out for training."""

    train: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a hub id: `owner/name`, with a
    configuration and a split as in `openai/gsm8k:main::train`."""

    heldout: str | None = None
    """The same for rows that are only evaluated. Without it a share of the training rows is."""

    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training rows that is held out when no `heldout` is given; 0 holds out none."""

    max_heldout_rows: int = Field(default=500, ge=1)
    """At most so many rows are held out, whichever way they are given."""

    format: Literal["auto", "messages", "alpaca", "completion", "text"] = "auto"
    """What a row is; `auto` finds it from the names of its fields."""

    fields: Annotated[dict[str, str] | None, BeforeValidator(_from_json)] = None
    """Names of the fields in your file: `{"prompt": "question", "completion": "answer"}`."""

    columns: list[str] | None = None
    """Names of the columns of a csv or tsv file that has no header line."""

    prompt: str | None = None
    """What the user says, made of a row's fields: `"Sentence: {text}\\nSentiment:"`."""

    system: str | None = None
    """System message for rows that bring none."""

    max_tokens: int = Field(default=1024, ge=2)
    """The longest row, and the length of a packed bin."""

    too_long: TooLong | None = None
    """What becomes of a row with more tokens than `max_tokens`. By default conversations are
    dropped (an error above 1 % of the rows) and plain text is split. `split` and `truncate` are
    for plain text only: they would cut a conversation's trained end of turn away."""

    packing: bool = True
    """Lay several rows into one bin, kept apart by their position ids. Otherwise every row is
    padded to the longest of its micro-batch."""

    loss_on: LossOn = "assistant"
    """Train what the assistant says, or all of the text."""

    max_rows: int | None = Field(default=None, ge=2)
    """Read only so many rows of `train`."""

    shuffle: bool = True
    """Visit the rows in a new random order every epoch."""

    @field_validator("fields")
    @classmethod
    def _are_fields_of_a_format(cls, fields: dict[str, str] | None) -> dict[str, str] | None:
        for name in fields or ():
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{name!r} is no field of a format.{hint} Its keys are of {', '.join(FIELDS)}; "
                    "its values are the names that your file has for them"
                )
        return fields

    @field_validator("prompt")
    @classmethod
    def _names_fields(cls, prompt: str | None) -> str | None:
        if prompt is not None:
            names = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
            if not names or not all(name.isidentifier() for name in names):
                raise ValueError(
                    "name the row's fields in braces, such as 'Sentence: {text}', and write "
                    "{{ and }} for braces that are text"
                )
            # a shell hands over \n as two characters
            prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
        return prompt
