"""The split into pretraining text and held-out objects.

One object in 26 is held out, chosen by the hash of its name.  Its docstring, under any alias, is in
no document that the tokenizer or the model sees.  Objects whose first sentence also occurs in other
text are never held out.  So the held-out rows measure fine-tuning, not memory of the pretraining.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from demo_base.docstrings import PLATFORM_MODULES, Documented, documented_objects, name_order, plain
from demo_base.questions import Row, draw, first_sentence, row

ONE_IN = 26
"""One of this many objects is held out, if it may be."""

NO_ROWS = {"test", "idlelib", "lib2to3", "turtledemo", *PLATFORM_MODULES}
"""Modules for pretraining only: users do not ask about them."""


@dataclass(frozen=True)
class Corpus:
    """Text and rows, split into seen in pretraining and held out."""

    documents: list[str]
    rows: list[Row]
    held_out_documents: list[str]
    held_out_rows: list[Row]


def collect() -> Corpus:
    """Collect all text and rows, and split them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules
        objects = documented_objects()
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    answers = usable_answers(objects)
    everything = "\n".join(plain(text) for text in [*topics.values(), *(o.doc for o in objects)])
    held_out = [
        found
        for found, answer in answers.items()
        if draw(found.name, ONE_IN, "split") == 0
        and everything.count(plain(answer).rstrip(".")) == 1
    ]
    names = {found.name for found in held_out}
    seen = [found for found in objects if found.name not in names]
    return Corpus(
        documents=[f"topic {name}\n{text}" for name, text in sorted(topics.items())]
        + [found.text for found in seen],
        rows=[row(found, answers[found]) for found in seen if found in answers],
        held_out_documents=[found.text for found in held_out],
        held_out_rows=[row(found, answers[found]) for found in held_out],
    )


def usable_answers(objects: Sequence[Documented]) -> dict[Documented, str]:
    """The first sentences of public objects: each name once, each sentence under its best name."""
    answers: dict[Documented, str] = {}
    taken: set[str] = set()
    for found in sorted(objects, key=lambda found: (name_order(found.name), found.doc)):
        is_public = not name_order(found.name)[0] and found.name.split(".")[0] not in NO_ROWS
        answer = first_sentence(found.doc) if is_public else None
        if answer and not taken & {plain(answer), found.name}:
            answers[found] = answer
            taken |= {plain(answer), found.name}
    return dict(sorted(answers.items(), key=lambda item: item[0].name))
