"""The `data` settings of a recipe."""

import difflib
import json
import re
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from qlora_lite.foundation.settings import Settings

TooLong = Literal["error", "drop", "split", "truncate"]
Reasoning = Literal["train", "context", "drop"]
LossOn = Literal["assistant", "all"]

FIELDS = ("messages", "tools", "instruction", "input", "output", "prompt", "completion", "text")
"""Names of the fields of all formats."""


def _from_json(value: Any) -> Any:
    """Accept a mapping as JSON text as well."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'JSON is needed, such as {{"prompt": "question"}}. This is not JSON: {error}'
        ) from None


class Data(Settings):
    """Which rows are read, how their fields are used, and how they are packed for training."""

    train: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a hub id: `owner/name`, optionally
    with a configuration and a split, as in `openai/gsm8k:main::train`."""

    heldout: str | None = None
    """The same for rows that are only evaluated. Default: a share of the training rows."""

    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training rows to hold out if `heldout` is not given; 0 holds out none."""

    max_heldout_rows: int = Field(default=500, ge=1)
    """The largest number of held-out rows, from `heldout` or from the training rows."""

    format: Literal["auto", "messages", "alpaca", "completion", "text"] = "auto"
    """The format of the rows; `auto` detects it from the names of their fields."""

    fields: Annotated[dict[str, str] | None, BeforeValidator(_from_json)] = None
    """Field names of your file: `{"prompt": "question", "completion": "answer"}`."""

    columns: list[str] | None = None
    """Column names of a csv or tsv file without a header line."""

    prompt: str | None = None
    """A template for the user message: `"Sentence: {text}\\nSentiment:"`, with fields in braces."""

    system: str | None = None
    """System message for rows that have none."""

    template: str | None = None
    """The chat template: chatml, llama3, gemma, mistral, alpaca, plain, or a jinja file. Default:
    that of the tokenizer. Every output has it."""

    max_tokens: int = Field(default=1024, ge=2)
    """The largest number of tokens in a row, and in a packed bin."""

    too_long: TooLong | None = None
    """What to do with a row of more than `max_tokens` tokens. By default conversations are dropped
    (an error if more than 1 % of the rows are) and plain text is split. `split` and `truncate` are
    for plain text only: they would cut off the trained end of turn of a conversation."""

    packing: bool = True
    """Pack several rows into one bin; attention stays within each row. Otherwise every row is
    padded to the longest one of its micro-batch."""

    loss_on: LossOn = "assistant"
    """Compute the loss on the assistant messages only, or on all of the text."""

    reasoning: Reasoning = "train"
    """What to do with reasoning in answers: train it, give it as context without training it, or
    drop it."""

    max_rows: int | None = Field(default=None, ge=2)
    """Read only the first rows of `train`, this many."""

    shuffle: bool = True
    """Use a new random order of the rows in every epoch."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _is_no_share(cls, heldout: Any) -> Any:
        if isinstance(heldout, int | float):
            raise ValueError(
                f"a file or a hub id is needed. For a share of the training rows, set "
                f"data.heldout_share={heldout}"
            )
        return heldout

    @field_validator("heldout_share")
    @classmethod
    def _is_the_only_source(cls, share: float, info: ValidationInfo) -> float:
        default = cls.model_fields["heldout_share"].default
        if info.data.get("heldout") is not None and share not in (0, default):
            raise ValueError(
                f"data.heldout={info.data['heldout']!r} is given too. Rows are held out from a "
                "file or from the training rows: remove one of the two settings"
            )
        return share

    @field_validator("reasoning")
    @classmethod
    def _is_not_all_trained(cls, reasoning: Reasoning, info: ValidationInfo) -> Reasoning:
        if reasoning == "context" and info.data.get("loss_on") == "all":
            raise ValueError(
                "data.loss_on=all trains all of the text, so reasoning cannot be context. Set "
                "data.loss_on=assistant"
            )
        return reasoning

    @field_validator("fields")
    @classmethod
    def _check_field_names(cls, fields: dict[str, str] | None) -> dict[str, str] | None:
        for name in fields or ():
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{name!r} is not a field of any format.{hint} Allowed keys: "
                    f"{', '.join(FIELDS)}. The values are the field names of your file"
                )
        return fields

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        if prompt is not None:
            parts = [part for part in string.Formatter().parse(prompt) if part[1] is not None]
            names = [name for _, name, _, _ in parts if name is not None]
            if not names or not all(name.isidentifier() for name in names):
                raise ValueError(
                    "put the names of fields in braces, such as 'Sentence: {text}', and write "
                    "{{ and }} for literal braces"
                )
            for _, name, spec, conversion in parts:
                if conversion not in (None, *"rsa") or not re.fullmatch(r"[^{}]*", spec or ""):
                    raise ValueError(f"write the field {name!r} in braces alone: {{{name}}}")
                if re.search(r"\d{5}", spec or ""):
                    raise ValueError(f"the width or precision of the field {name!r} is too large")
            # a shell passes \n as two characters
            prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
        return prompt
