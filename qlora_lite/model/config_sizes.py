"""Upper limits of the numbers in a `config.json`. A model of a million layers, experts or labels
would take hours to build, even without weights.

Each limit is about ten times the largest value in use.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field
from transformers.configuration_utils import PretrainedConfig

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.json_files import JsonFile, Malformed, check_as, shown

MAX_COUNT, MAX_WIDTH = 20_000, 2_000_000

_COUNT = re.compile(r"(num_(?!position)|n_(?!embd|inner|positions|ctx)).*|.*(layers|heads|experts)")
_WIDTH = re.compile(r"(?!.*vocab).*(size|dim|inner|embd|d_model|d_ff|dff|dim_ff|rank)")
"""Fields of any architecture, by their names: `num_labels`, `n_shared_experts`; `ffn_dim`."""


def require_possible_numbers(model: str, values: Mapping[str, Any]) -> None:
    """Check the counts and widths of a `config.json`, before transformers reads it.

    Raises:
        BaseModelError: naming the field that is too large.
    """
    for name, value in _integers(values):
        limit = MAX_COUNT if _COUNT.fullmatch(name) else MAX_WIDTH
        if value > limit and (_COUNT.fullmatch(name) or _WIDTH.fullmatch(name)):
            raise _impossible(model, f"{name}: got {shown(value)}, at most {limit:,} is possible")


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer at any depth, with the name of its field."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int:
                yield name, number


class _Sizes(JsonFile):
    num_hidden_layers: Annotated[int, Field(ge=1, le=2_000)] | None = None
    hidden_size: Annotated[int, Field(ge=1, le=200_000)] | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=2_000_000)] | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=2_000)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=2_000)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=20_000)] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=10**9)] | None = None
    num_experts: Annotated[int, Field(ge=0, le=20_000)] | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=20_000)] | None = None
    n_routed_experts: Annotated[int, Field(ge=0, le=20_000)] | None = None


def require_possible_sizes(model: str, config: PretrainedConfig) -> None:
    """Check the sizes and their types, before the model is built.

    Raises:
        BaseModelError: naming the field that is out of range or has another type.
    """
    text = config.get_text_config(decoder=True)
    found = {}
    for name in _Sizes.model_fields:
        try:
            value = getattr(text, name, None)
        except (AttributeError, RuntimeError, ValueError):
            continue  # it differs between layers
        # some families have a list with one value per layer
        found[name] = max(value) if isinstance(value, list) and _are_ints(value) else value
    try:
        check_as(found, _Sizes)
    except Malformed as error:
        raise _impossible(model, str(error)) from None
    require_possible_numbers(model, vars(text))


def _are_ints(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def _impossible(model: str, problem: str) -> BaseModelError:
    return BaseModelError(
        f"base.model={model}: its config.json is damaged, or no model has this size ({problem}). "
        "Download it again"
    )
