"""Parameters whose values are divided among processes, as under ZeRO-3.

DeepSpeed replaces the data of such a parameter by an empty tensor, and fills it while the module
that owns it runs. Elsewhere it is gathered here.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed divides this parameter among the processes."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, the parameters have their whole values, for reading. Collective if one is divided."""
    divided = [p for p in parameters if is_partitioned(p) and not p.data.numel()]
    if not divided:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(divided)
    return context
