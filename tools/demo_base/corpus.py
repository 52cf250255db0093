"""What pretraining may see, and what is held out.

One object in 26 is held out, chosen by the hash of its name.  Its docstring is in no document
that the tokenizer or the model sees, under no alias, and its first sentence stands in no other
text: an object whose first sentence also occurs elsewhere is never held out.  So the held-out rows
measure what fine-tuning taught, not what pretraining remembers.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from demo_base.docstrings import PLATFORM_MODULES, Documented, documented_objects, plain, renown
from demo_base.questions import Row, draw, first_sentence, row

ONE_IN = 26
"""One object in so many is held out, of those that may be."""

NO_ROWS = {"test", "idlelib", "lib2to3", "turtledemo", *PLATFORM_MODULES}
"""Good for pretraining, but nobody asks what these do."""


@dataclass(frozen=True)
class Corpus:
    """The text and the rows, parted by what the model may see in pretraining."""

    documents: list[str]
    rows: list[Row]
    held_out_documents: list[str]
    held_out_rows: list[Row]


def collect() -> Corpus:
    """Every text and every row on one of the two sides, or on none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from modules that will leave the library some day
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
    for found in sorted(objects, key=lambda found: (renown(found.name), found.doc)):
        is_public = not renown(found.name)[0] and found.name.split(".")[0] not in NO_ROWS
        answer = first_sentence(found.doc) if is_public else None
        if answer and not taken & {plain(answer), found.name}:
            answers[found] = answer
            taken |= {plain(answer), found.name}
    return dict(sorted(answers.items(), key=lambda item: item[0].name))
