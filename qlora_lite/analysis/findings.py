"""The results of an inspection as plain values, for tables, JSON and figures."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Grid = tuple[tuple[float, ...], ...]
"""phi(i, j) at [i - 1][j - 1]."""


Shape = tuple[int, int]
"""(d_out, d_in)"""


@dataclass(frozen=True)
class Amplification:
    """A weight W projected on the top directions U, V of its delta: table 4 of Hu et al. 2021."""

    rank: int
    """Number of columns of U and V."""
    weight_there: float
    """||U^T W V||_F"""
    weight_at_top: float
    """The same for the top directions of W itself."""
    weight_by_chance: float
    """The same for random directions."""
    factor: float | None
    """||dW||_F / ||U^T W V||_F; None if the scale of the delta is not known."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of one target. Values that need the base or the scale are None without them."""

    path: str
    shape: Shape
    rank: int
    """Rank of the adapter at this layer."""
    kept_rank: int
    """Number of singular values above rounding."""
    effective_rank: float
    """exp of the entropy of the normalised singular values."""
    singular_values: tuple[float, ...]
    """Of the delta, descending; relative to the largest if its scale is not known."""
    norm: float | None
    """||dW||_F"""
    weight_norm: float | None
    """||W||_F"""
    relative_norm: float | None
    """||dW||_F / ||W||_F"""
    amplification: Amplification | None
    gates: tuple[float, ...] | None
    """Gates of the layer, for methods that have them."""


@dataclass(frozen=True)
class TargetReport:
    """One run or adapter."""

    target: str
    what: str
    base: str | None
    is_scaled: bool
    """False if the scale of its deltas is not known."""
    notes: tuple[str, ...]
    layers: tuple[LayerRow, ...]


@dataclass(frozen=True)
class PhiRow:
    """phi of two targets at one layer."""

    path: str
    shape: Shape
    of: Literal["factors", "delta"]
    """Which singular directions are compared: of the trained A and B if both targets have them,
    else of the deltas."""
    right: Grid
    """Of A, or the delta's right directions: inputs."""
    left: Grid
    """Of B, or the delta's left directions: outputs. Empty if one of them is zero."""


@dataclass(frozen=True)
class Comparison:
    """phi of two targets; `first` and `second` are indices into the targets."""

    first: int
    second: int
    layers: tuple[PhiRow, ...]


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`."""

    targets: tuple[TargetReport, ...]
    comparisons: tuple[Comparison, ...]
    """One per pair of targets."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)
