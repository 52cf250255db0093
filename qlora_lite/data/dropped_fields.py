"""Refuse rows with a field that changes the training elsewhere and that no format here reads.

A row would otherwise be trained without its documents, its images or its weight. The rule:

- Every field of a message is read (`messages.READ`), or is metadata that cannot change the text
  (`METADATA`), or has a neutral value. What is read reaches the chat template; what the template
  does not write is refused there (`data/written.py`).
- `label: false` marks a bad answer in preference data.
- A row may have any columns, as tables do. Only fields that the formats of chat data define
  (`MEANINGFUL`, and `TEXTS` where the text is composed from fields) must be read, or be neutral. A
  field is read if the format uses it (by its name in `data.fields`), or if `data.prompt` names it.

Neutral are null, an empty value, and what every row without the field means: weight 1, train true,
mask false, end of turn true. A list is neutral if all its values are.
"""

from collections.abc import Mapping
from typing import Any

from qlora_lite.data.formats import Format, fields_in
from qlora_lite.data.messages import READ
from qlora_lite.data.row_errors import RowError
from qlora_lite.foundation.json_files import shown

TRAINED = frozenset(
    [
        *("weight", "weights", "train", "trainable", "loss", "loss_mask", "loss_weight"),
        *("loss_weights", "train_on_turn", "train_on_output", "train_on_outputs"),
        *("train_on_completion", "train_on_completions", "train_on_responses"),
    ]
)
"""Whether or how strongly a turn or a row is trained. Neutral: 1 and true."""

MASKED = frozenset({"mask", "masked", "train_on_input", "train_on_inputs", "train_on_prompt"})
"""Whether a turn is left out of the loss, or a prompt is in it. Neutral: 0 and false."""

ENDS = frozenset({"end_turn", "eot"})
"""Whether the turn ends after a message. Neutral: true."""

SWITCHES = frozenset({"thinking", "enable_thinking"})
"""Settings of the chat template. Neither true nor false is neutral."""

MEANINGFUL = frozenset(
    [
        "audio",
        "audios",
        "chat_template_kwargs",
        "documents",
        "enable_thinking",
        "function_call",
        "functions",
        "image",
        "images",
        "parallel_tool_calls",
        "reasoning",
        "reasoning_content",
        "thinking",
        "tool",
        "tool_call_id",
        "tool_calls",
        "tool_choice",
        "tool_responses",
        "tools",
        "video",
        "videos",
    ]
)
"""Fields of a row that the formats of chat data define, for rows of every format."""

TEXTS = frozenset({"system", "system_prompt", "history"})
"""Fields of a row that other tools put in front of its messages."""

METADATA = frozenset(
    [
        "annotations",
        "author",
        "country",
        "created",
        "created_at",
        "create_time",
        "dataset",
        "date",
        "emotion",
        "finish_reason",
        "hash",
        "hashed_ip",
        "header",
        "id",
        "index",
        "is_edited",
        "labels",
        "lang",
        "language",
        "message_id",
        "meta",
        "metadata",
        "model",
        "num_tokens",
        "parent",
        "parent_id",
        "quality",
        "rating",
        "redacted",
        "score",
        "source",
        "state",
        "status",
        "stop_reason",
        "time",
        "timestamp",
        "token_count",
        "tokens",
        "toxic",
        "turn",
        "turn_id",
        "turn_identifier",
        "type",
        "url",
        "usage",
        "user_id",
        "uuid",
    ]
)
"""Fields of a message that cannot change its text."""

ALLOWED = METADATA | frozenset(READ)
"""Fields of a message that may have any value here."""


def refused_fields(
    kind: str, chosen: Format, names: Mapping[str, str], prompt: str | None
) -> frozenset[str]:
    """The fields of a row that need a neutral value: those that the format does not read.

    Args:
        names: `data.fields`.
        prompt: `data.prompt`.
    """
    meaningful = MEANINGFUL | TRAINED | MASKED
    if kind != "text":
        meaningful |= TEXTS
    if kind == "completion":
        meaningful |= {"label"} if prompt is not None else {"label", "input"}
    read = {names.get(field, field) for field in (*chosen.needs, *chosen.optional)}
    return meaningful - read - fields_in(prompt or "")


def require_neutral(row: Mapping[str, Any], refused: frozenset[str], messages: str | None) -> None:
    """Check that a row loses nothing by being read without some of its fields.

    Args:
        refused: from `refused_fields`.
        messages: the name of the field with the messages, for that format.

    Raises:
        RowError: with the field, its value, and what to do.
    """
    for name in sorted(row.keys() & refused):
        if not _is_neutral(name, row[name]):
            raise RowError(name, _problem(name, row[name]))
    found = row.get(messages) if messages else None
    for i, message in enumerate(found if isinstance(found, list | tuple) else ()):
        # what is not a message at all is reported by the format
        for name in sorted(message.keys() - ALLOWED) if isinstance(message, Mapping) else ():
            if not _is_neutral(name, message[name]):
                raise RowError(f"{messages}[{i}].{name}", _problem(name, message[name]))


def _is_neutral(name: str, value: Any) -> bool:
    """Whether the row means the same without this field. Tables have numbers as text."""
    text = str(value).strip().lower() if isinstance(value, str | int | float) else None
    if value is None or text in ("", "nan", "null", "none", "[]", "{}"):
        return True
    if isinstance(value, list | tuple) and value and name in TRAINED | MASKED:
        return all(_is_neutral(name, one) for one in value)
    if name in TRAINED | ENDS:
        return text in ("1", "1.0", "true")
    if name in MASKED:
        return text in ("0", "0.0", "false")
    if name == "label" or value is False:  # other labels are classes
        return (name == "label") is (value is not False) and name not in SWITCHES
    return isinstance(value, list | tuple | Mapping | bytes) and not value


def _problem(name: str, value: Any) -> str:
    if name in TRAINED | MASKED:
        effect = "the row would be trained like any other. Remove the row, or remove the"
    elif name == "label":
        effect = "an answer that is marked as bad would be trained. Remove such rows, or the"
    elif name in ENDS:
        effect = "the end of the turn would be trained after it. Join the messages or remove the"
    elif name in TEXTS | {"input"}:
        effect = (
            "its text would be missing. Put it into the messages or into data.prompt, or remove the"
        )
    else:
        effect = "it would be missing in training. Remove the"
    return f"got {shown(value)}, but this field is not used, so {effect} field from the rows"
