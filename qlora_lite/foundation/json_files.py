"""JSON files as typed models, so that damage is found where a file is read.

    record = read_as(path, RunRecord)       # or Malformed: "steps: got ..."

The caller turns `Malformed` into its own error, with the path and what to do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_lite.foundation.files import read_object

SHOWN_CHARACTERS = 60


class Malformed(ValueError):
    """What is wrong with a file: the field, what it has, and what is needed."""


class JsonFile(BaseModel):
    """Base class of the models of JSON files. Types are exact; unknown fields are ignored, because
    later versions may write more."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Count = Annotated[int, Field(ge=0, le=2**62)]
NonNegative = Annotated[float, Field(ge=0)]

Model = TypeVar("Model", bound=BaseModel)


def read_as(path: Path, model: type[Model]) -> Model:
    """The content of a JSON file as `model`.

    Raises:
        Malformed: if the file cannot be read, is not a JSON object, or has a wrong field.
    """
    try:
        values = read_object(path)
    except (OSError, ValueError) as error:
        raise Malformed(str(error)) from None
    return check_as(values, model)


def check_as(values: Mapping[str, Any], model: type[Model]) -> Model:
    """`values` as `model`.

    Raises:
        Malformed: naming the first wrong field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        raise Malformed(f"it has no {field}")
    needed = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    raise Malformed(f"{field}: got {shown(problem['input'])}, {needed} is needed")


def shown(value: Any) -> str:
    """A value for an error message, cut to `SHOWN_CHARACTERS`."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return "a huge number"
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
