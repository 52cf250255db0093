"""The rank and the scale of every layer, from one rank and a map of exceptions.

    ranks = {"0-7": 32, "*.mlp.*": 4, "11": 0}

A pattern is a block, a range of blocks, a name or a glob of the path; the last match wins.
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.targets import LinearSpec

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]


@dataclass(frozen=True)
class LayerPlan:
    """Rank and scale of one layer, chosen before it is built."""

    rank: int
    scale: float


def rank_of(spec: LinearSpec, rank: int, ranks: Mapping[str, int]) -> int:
    """The rank of one layer: the last pattern of `ranks` that matches it, else `rank`."""
    for pattern, other in ranks.items():
        if _matches(spec, pattern):
            rank = other
    return rank


def scale_of(alpha: float, rank: int, scaling: Scaling) -> float:
    """alpha/r (LoRA) or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if scaling == "alpha/sqrt(r)" else rank)


def cut_to_weight(
    plans: Mapping[str, LayerPlan], specs: Sequence[LinearSpec], alpha: float, scaling: Scaling
) -> dict[str, LayerPlan]:
    """The plans with ranks of at most min(d_in, d_out), the full rank of a weight."""
    full = {spec.path: min(spec.d_in, spec.d_out) for spec in specs}
    return {
        path: plan
        if plan.rank <= full[path]
        else LayerPlan(full[path], scale_of(alpha, full[path], scaling))
        for path, plan in plans.items()
    }


def check_ranks(specs: Sequence[LinearSpec], ranks: Mapping[str, int]) -> None:
    """Check that every pattern matches a layer.

    Raises:
        AdapterError: if a pattern matches none of the layers.
    """
    last = last_block(specs)
    for pattern in ranks:
        if not any(_matches(spec, pattern) for spec in specs):
            names = sorted({spec.name for spec in specs})
            raise AdapterError(
                f"adapter.ranks: {pattern!r} matches no adapted layer. Write block numbers "
                f'("0-{last}"), a name ({", ".join(names)}) or a glob of the path '
                f'(such as "{specs[0].path}")'
            )


def beyond_the_last(specs: Sequence[LinearSpec], ranks: Mapping[str, int]) -> list[str]:
    """Patterns with blocks that this model does not have, perhaps written for a larger model."""
    last = last_block(specs)
    return [pattern for pattern in ranks if last < (_blocks(pattern) or [0])[-1]]


def last_block(specs: Sequence[LinearSpec]) -> int:
    return max((spec.block or 0 for spec in specs), default=0)


def _matches(spec: LinearSpec, pattern: str) -> bool:
    blocks = _blocks(pattern)
    if blocks is None:
        return fnmatch.fnmatch(spec.path, pattern) or spec.name == pattern
    return spec.block in blocks


def _blocks(pattern: str) -> range | None:
    """The blocks of a pattern such as "3" or "0-5"; None if it is a name or a glob."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", pattern)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else None
