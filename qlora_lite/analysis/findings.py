"""What an inspection found, as plain values: for tables, JSON and figures alike."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Grid = tuple[tuple[float, ...], ...]
"""phi(i, j) at [i - 1][j - 1]."""


Shape = tuple[int, int]
"""(d_out, d_in)"""


@dataclass(frozen=True)
class Amplification:
    """A weight W in the strongest directions U, V of its delta: table 4 of Hu et al. 2021."""

    rank: int
    """How many directions U and V are."""
    weight_there: float
    """||U^T W V||_F"""
    weight_at_top: float
    """The same in the strongest directions of W itself."""
    weight_by_chance: float
    """The same in random directions."""
    factor: float | None
    """||dW||_F / ||U^T W V||_F; None if the scale of the delta is not known."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of one target. What needs the base or the scale is None without them."""

    path: str
    shape: Shape
    rank: int
    """That the layer was given."""
    kept_rank: int
    """Singular values that are more than rounding."""
    effective_rank: float
    """exp of the entropy of the normalised singular values."""
    singular_values: tuple[float, ...]
    """Of the delta, falling; relative to the largest if its scale is not known."""
    norm: float | None
    """||dW||_F"""
    weight_norm: float | None
    """||W||_F"""
    relative_norm: float | None
    """||dW||_F / ||W||_F"""
    amplification: Amplification | None
    gates: tuple[float, ...] | None
    """Of a method that has them."""


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
    """phi of one layer that two targets have."""

    path: str
    shape: Shape
    of: Literal["factors", "delta"]
    """Whose singular directions are compared: those of the trained A and B where both targets have
    them, else those of the deltas."""
    right: Grid
    """Of A, or the delta's right directions: inputs."""
    left: Grid
    """Of B, or the delta's left directions: outputs. Empty if one of them is zero."""


@dataclass(frozen=True)
class Comparison:
    """phi of two targets, by their numbers in the order in which they were given."""

    first: int
    second: int
    layers: tuple[PhiRow, ...]


@dataclass(frozen=True)
class Inspection:
    """All that was asked for."""

    targets: tuple[TargetReport, ...]
    comparisons: tuple[Comparison, ...]
    """Of every two targets."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)
