"""The parent of every settings model: frozen, strict about names, described by its docstrings."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen settings. Unknown fields are errors; attribute docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        # `model` is the natural name of a base model's field
        protected_namespaces=(),
    )
