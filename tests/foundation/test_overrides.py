"""`key=value` overrides: what they set, what they keep, and the errors for mistakes."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.overrides import apply_overrides, validate
from qlora_lite.foundation.settings import Settings


class Circle(Settings):
    kind: Literal["circle"] = "circle"
    size: int = Field(1, ge=1)
    smooth: bool = True


class Square(Settings):
    kind: Literal["square"] = "square"
    size: int = 2
    corner: Literal["sharp", "round"] = "sharp"


class Inner(Settings):
    rate: float = 0.1
    names: list[str] = Field(default_factory=list)


class Outer(Settings):
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    inner: Inner = Inner()
    title: str | None = None


def settings_of(values, *assignments):
    return validate(Outer, apply_overrides(values, assignments, Outer)[0])


def test_a_path_reaches_into_nested_settings():
    assert settings_of({}, "inner.rate=1e-4").inner.rate == 1e-4
    assert settings_of({"inner": {"rate": 0.5}}, 'inner.names=["a","b"]').inner.names == ["a", "b"]


def test_a_value_that_is_not_json_is_text():
    assert settings_of({}, "title=22GiB").title == "22GiB"
    assert settings_of({"title": "x"}, "title=null").title is None
    assert settings_of({}, "shape.smooth=False").shape == Circle(smooth=False)


def test_a_bare_name_switches_the_kind_and_keeps_shared_fields():
    values = {"shape": {"kind": "circle", "size": 7, "smooth": False}}
    result, notes = apply_overrides(values, ["shape=square", "shape.corner=round"], Outer)
    assert validate(Outer, result).shape == Square(size=7, corner="round")
    assert notes == [
        "shape=square: kept size=7; dropped smooth=False, which square does not have; the other "
        "fields get the defaults of square"
    ]


def test_a_field_of_the_default_kind_needs_no_kind():
    assert settings_of({}, "shape.size=3").shape == Circle(size=3)


def test_the_given_values_are_not_modified():
    values = {"inner": {"rate": 0.5}}
    apply_overrides(values, ["inner.rate=1"], Outer)
    assert values == {"inner": {"rate": 0.5}}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("inner.rte=1", ["inner.rte", "Did you mean 'rate'", "names"]),
        ("shape=sqare", ["shape", "Did you mean 'square'", "circle"]),
        ("shape.corner=round", ["shape.corner", "'corner'", "smooth"]),
        ("inner.rate", ["key=value"]),
        ("title.x=1", ["title", "single value"]),
        ("inner.rate=fast", ["inner.rate", "'fast'", "number"]),
        ("shape.size=0", ["shape.size", "greater than or equal to 1"]),
    ],
)
def test_an_error_names_the_path_what_is_allowed_and_the_closest_match(assignment, words):
    with pytest.raises(RecipeError) as caught:
        settings_of({}, assignment)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_choice_lists_the_choices():
    with pytest.raises(RecipeError, match=r"shape\.corner.*Did you mean 'round'.*sharp"):
        settings_of({"shape": {"kind": "square"}}, "shape.corner=rund")
