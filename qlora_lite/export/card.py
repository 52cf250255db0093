"""The model card of a merged model: its base, how it was trained and merged, and its scores.

The head is YAML that the hub and other tools read; the body is for people.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from qlora_lite.foundation.console import sparkline
from qlora_lite.foundation.json_files import shown
from qlora_lite.foundation.units import format_bytes

_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Card:
    """The content of a card, as plain values."""

    title: str
    base_model: str
    """Hub id or name of the base."""
    on_hub: bool
    """Whether the base has a hub id: the hub refuses a card that names a base it does not have."""
    licence: Mapping[str, Any]
    """`license`, `license_name` and `license_link` of the base's card; empty if unknown."""
    commands: Sequence[str]
    recipe: Mapping[str, Any]
    facts: Mapping[str, str]
    """Hardware, tokens, time, versions."""
    memory: Sequence[tuple[str, int, int | None]]
    """(what, predicted bytes, measured bytes)"""
    losses: Sequence[float]
    """Of the training steps, in order."""
    heldout: Sequence[tuple[int, float]]
    """(step, held-out loss)"""
    samples: Sequence[tuple[str, str, str]]
    """(prompt, answer before, answer after)"""
    merge: Sequence[tuple[str, float, float | None, bool]]
    """(candidate, loss, top-1 agreement with the trained model, written)"""
    notes: Sequence[str] = field(default_factory=tuple)
    """Sentences about the merge and its check."""


def licence_of(base: Path) -> dict[str, Any]:
    """The licence in the base's own card; empty if there is no card.

    Raises:
        ValueError: if the card cannot be read, so that its licence is unknown.
    """
    card = base / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{card} cannot be read: {str(error).partition(chr(10))[0]}") from None
    found = {key: metadata[key] for key in _LICENCE_KEYS if metadata.get(key)}
    for key, value in found.items():
        names = value if isinstance(value, list) and key == "license" else [value]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{card} has {key}: {shown(value)}, and text is needed")
    return found


def render(card: Card) -> str:
    """The card as README.md."""
    head = ModelCardData(
        base_model=card.base_model if card.on_hub else None,
        base_model_relation="finetune" if card.on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        **card.licence,
    )
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# {_inline(card.title)}\n",
        f"`{card.base_model}` fine-tuned with qlora-lite and merged: a complete model that loads "
        f"with transformers. To make it again, save the recipe below as `recipe.json`, adapt its "
        f"paths, and run:\n\n"
        f"{_fenced(chr(10).join(card.commands), 'sh')}",
        _section("Merge", _merge(card)),
        _section("Loss", _loss(card)),
        _section("Before and after", "\n".join(_sample(*sample) for sample in card.samples)),
        _section("Memory", _memory(card)),
        _section("Facts", _table(("", ""), card.facts.items()) if card.facts else ""),
        _section("Recipe", _fenced(json.dumps(card.recipe, indent=2, ensure_ascii=False), "json")),
    ]
    return "\n".join(part for part in parts if part)


def _merge(card: Card) -> str:
    rows = [
        (
            candidate,
            f"{loss:.4f}",
            "" if agreement is None else f"{agreement:.2%}",
            "yes" if written else "",
        )
        for candidate, loss, agreement, written in card.merge
    ]
    head = ("candidate", "held-out loss", "top-1 agreement", "written")
    table = _table(head, rows) if rows else ""
    notes = "".join(f"- {note}\n" for note in card.notes)
    return "\n".join(part for part in (table, notes) if part)


def _loss(card: Card) -> str:
    curve = ""
    if card.losses:
        ends = f"{card.losses[0]:.3f} -> {card.losses[-1]:.3f}"
        curve = _fenced(f"training {sparkline(card.losses)} {ends}")
    rows = [(f"{step}", f"{loss:.4f}") for step, loss in card.heldout]
    return curve + (f"\n{_table(('step', 'held-out loss'), rows)}" if rows else "")


def _sample(prompt: str, before: str, after: str) -> str:
    return _fenced(f"prompt: {prompt}\nbefore: {before}\nafter:  {after}")


def _memory(card: Card) -> str:
    rows = [
        (what, format_bytes(predicted), "" if measured is None else format_bytes(measured))
        for what, predicted, measured in card.memory
    ]
    return _table(("part", "predicted", "measured"), rows) if rows else ""


def _section(heading: str, content: str) -> str:
    return f"## {heading}\n\n{content}" if content else ""


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(_inline(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """Text escaped for a table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}\n"
