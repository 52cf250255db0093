"""Rows: a question about an object, and the first sentence of its docstring as the answer."""

import hashlib
import re

from demo_base.docstrings import Documented


def first_sentence(doc: str) -> str | None:
    """The first sentence of a docstring, or None if it is not a usable answer.

    >>> first_sentence("S.join(iterable) -> str\\n\\nConcatenate any number of strings.  Then ...")
    'Concatenate any number of strings.'
    """
    lines = [line.strip() for line in doc.strip().splitlines()]
    while lines and (not lines[0] or is_signature(lines[0])):
        lines = lines[1:]
    paragraph = " ".join(lines[: lines.index("")] if "" in lines else lines)
    paragraph = re.sub(r"^[\w.]+(\([^)]*\))? (--?|->) ", "", " ".join(paragraph.split()))
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!](?=\s|$)", paragraph)
    sentence = paragraph[: end.start()] if end else paragraph
    return f"{sentence[0].upper()}{sentence[1:]}." if is_usable(sentence) else None


def is_signature(line: str) -> bool:
    """A line such as `pow(x, y, z=None)`, `S.find(sub[, start]) -> int` or `Tuple(name, age)`."""
    return bool(re.match(r"^[\w.\[\]]+\([^)]*\)?[)\]]*\s*(->.*|:)?$", line.strip()))


def is_usable(sentence: str) -> bool:
    """Neither too short nor too long, and words rather than code."""
    letters = sum(c.isalpha() or c in " ,'-" for c in sentence)
    return (
        20 <= len(sentence) <= 180
        and len(sentence.split()) >= 4
        and sentence[0].isalpha()
        and sentence[-1] not in ":,;-("
        and sentence.count("(") == sentence.count(")")
        and letters >= 0.85 * len(sentence)
        and not re.search(
            r">>>|::|\s[-=~]{2,}|^Alias for field|^Return self|^Initialize self|^Created on",
            sentence,
        )
    )


Row = dict[str, list[dict[str, str]]]
"""A conversation: `{"messages": [{"role": ..., "content": ...}, ...]}`."""

QUESTIONS = {
    "function": (
        "What does {name} do?",
        "In Python, what does {name} do?",
        "What is {name} for?",
        "Describe {name} in one sentence.",
    ),
    "class": (
        "What is {name}?",
        "In Python, what is {name}?",
        "What is {name} for?",
        "Describe {name} in one sentence.",
    ),
    "module": ("What is the module {name} for?", "What does the module {name} offer?"),
    "attribute": ("What is {name}?", "What does {name} hold?"),
}


def draw(name: str, sides: int, purpose: str) -> int:
    """A number below `sides` that depends only on the name and the purpose."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % sides


def row(found: Documented, answer: str) -> Row:
    """One conversation of a question and its answer."""
    phrasings = QUESTIONS[found.kind]
    question = phrasings[draw(found.name, len(phrasings), "phrasing")].format(name=found.name)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
