"""Pydantic's errors as one line per wrong value."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from qlora_lite.foundation.settings import Settings
from qlora_lite.foundation.validation_messages import explain


class Fixed(Settings):
    kind: Literal["fixed"] = "fixed"
    width: int | float = 1


class Free(Settings):
    kind: Literal["free"] = "free"
    sides: list[Literal["left", "right"]] = Field(default_factory=list)


class Page(Settings):
    layout: Annotated[Fixed | Free, Field(discriminator="kind")] = Fixed()
    margins: dict[str, int] = Field(default_factory=dict)
    font: Fixed = Fixed()
    title: str


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "title: a value is needed"),
        (
            {"title": "a", "margns": 1},
            "margns: 'margns' is not known here. Did you mean 'margins'? "
            "Allowed: layout, margins, font, title",
        ),
        # the path without pydantic's parts: the kind of the union, and each type that was tried
        (
            {"title": "a", "layout": {"kind": "fixed", "width": "wide"}},
            "layout.width: got 'wide': Input should be a valid integer, unable to parse string as "
            "an integer, or Input should be a valid number, unable to parse string as a number",
        ),
        (
            {"title": "a", "layout": {"kind": "free", "sides": ["left", "rigth"]}},
            "layout.sides: 'rigth' is not known here. Did you mean 'right'? Allowed: left, right",
        ),
        (
            {"title": "a", "layout": {"kind": "fre"}},
            "layout: 'fre' is not known here. Did you mean 'free'? Allowed: fixed, free",
        ),
        # keys of a mapping stay in the path
        (
            {"title": "a", "margins": {"top": "x"}},
            "margins.top: got 'x': Input should be a valid integer, unable to parse string as an "
            "integer",
        ),
        ({"title": 3}, "title: got 3: text is needed. In a shell, type title='\"3\"'"),
        (
            {"title": "a", "layout": 3},
            "layout: got 3: a kind is needed, layout=NAME with one of fixed, free",
        ),
        (
            {"title": "a", "font": '{"width": 2'},
            "font: got '{\"width\": 2': a kind is needed, font=NAME with one of fixed. "
            "This is not valid JSON: Expecting ',' delimiter: line 1 column 12 (char 11). "
            "Quote the whole argument for the shell",
        ),
    ],
)
def test_a_wrong_value_gets_one_line(values, line):
    with pytest.raises(ValidationError) as caught:
        Page.model_validate(values)
    assert explain(caught.value, Page) == line
