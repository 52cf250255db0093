"""The base class of every settings model."""

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may start with `~`: no shell replaces it in a recipe or in `output=~/runs`."""


class Settings(BaseModel):
    """Frozen settings. Unknown fields are errors; attribute docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        # a field may be called `model`, or start with model_
        protected_namespaces=(),
    )


def kind_of_name(value: Any) -> Any:
    """`"nf4"` as `{"kind": "nf4"}`, for a field that is a union of settings by their kind."""
    return {"kind": value} if isinstance(value, str) and value.isidentifier() else value
