"""The numbers of one layer: ranks, norms and amplification of one target, phi of two."""

from dataclasses import dataclass

from torch import Tensor

from qlora_lite.analysis.findings import Amplification, Grid, LayerRow, PhiRow
from qlora_lite.analysis.norms import delta_norm, relative_norm, weight_norm
from qlora_lite.analysis.rank import SVD, effective_rank, kept_rank
from qlora_lite.analysis.subspace import (
    amplification,
    left_directions,
    phi_grid,
    projected_norm,
    projected_norm_by_chance,
    right_directions,
    top_norm,
)
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.inspection.deltas import Delta, Deltas

MAX_DIRECTIONS = 64
"""Of phi, unless more are requested: larger maps are not easier to read."""


@dataclass(frozen=True)
class LoadedLayer:
    """One layer of one target in memory."""

    target: str
    delta: Delta
    svd: SVD
    kept: int

    @classmethod
    def read(cls, deltas: Deltas, path: str) -> "LoadedLayer":
        delta = deltas.read(path)
        svd = delta.svd()
        return cls(deltas.target, delta, svd, kept_rank(svd.values, delta.shape))

    @property
    def num_directions(self) -> int:
        """All directions of a pair. A dense delta has full rank up to rounding, so only as many as
        the rank of its adapter."""
        return self.kept if self.delta.dense is None else min(self.delta.rank, self.kept)


def layer_row(layer: LoadedLayer, path: str, is_scaled: bool, top: int | None) -> LayerRow:
    """All numbers of one layer of one target; amplification of its `top` directions."""
    delta, values, weight = layer.delta, layer.svd.values, layer.delta.weight
    if not is_scaled and layer.kept:
        values = values / values.max()
    norm_of_weight = relative = None
    if weight is not None:
        norm_of_weight = weight_norm(weight)
        relative = relative_norm(values, weight) if is_scaled and norm_of_weight else None
    return LayerRow(
        path=path,
        shape=delta.shape,
        rank=delta.rank,
        kept_rank=layer.kept,
        effective_rank=effective_rank(values),
        singular_values=_digits(values),
        norm=delta_norm(values) if is_scaled else None,
        weight_norm=norm_of_weight,
        relative_norm=relative,
        amplification=_amplification(layer, is_scaled, top),
        gates=None if delta.gates is None else _digits(delta.gates),
    )


def _amplification(layer: LoadedLayer, is_scaled: bool, top: int | None) -> Amplification | None:
    """None without a weight, or if the delta is zero and has no directions."""
    rank = min(top or layer.num_directions, layer.kept)
    weight, svd = layer.delta.weight, layer.svd
    if weight is None or rank == 0:
        return None
    left, right = svd.left[:, :rank], svd.right[:, :rank]
    in_delta = projected_norm(weight, left, right)
    return Amplification(
        rank=rank,
        weight_there=in_delta,
        weight_at_top=top_norm(weight, rank),
        weight_by_chance=projected_norm_by_chance(weight_norm(weight), rank, layer.delta.shape),
        factor=amplification(svd.values, left, right, weight) if is_scaled and in_delta else None,
    )


def phi_row(
    path: str, first: LoadedLayer, second: LoadedLayer, i: int | None, j: int | None
) -> PhiRow:
    """phi of two targets at one layer: of their trained factors if both have them, else of the
    deltas. The grid has at least (i, j) entries."""
    are_pairs = first.delta.is_pair_trained and second.delta.is_pair_trained
    right_1, left_1 = _directions(first, path, are_pairs, i)
    right_2, left_2 = _directions(second, path, are_pairs, j)
    return PhiRow(
        path=path,
        shape=first.delta.shape,
        of="factors" if are_pairs else "delta",
        right=_grid(right_1, right_2),
        left=_grid(left_1, left_2),
    )


def _directions(
    layer: LoadedLayer, path: str, of_pair: bool, wanted: int | None
) -> tuple[Tensor, Tensor]:
    """Right and left singular directions, strongest first: at least `wanted`, else at most
    `MAX_DIRECTIONS`.

    Raises:
        AdapterError: if there are fewer than `wanted`.
    """
    delta, svd = layer.delta, layer.svd
    if of_pair:
        assert delta.pair is not None
        right, left = right_directions(delta.pair.down), left_directions(delta.pair.up)
    else:
        right, left = svd.right[:, : layer.kept], svd.left[:, : layer.kept]
    num_found = min(right.shape[1], left.shape[1])
    if wanted is not None and wanted > num_found:
        raise AdapterError(
            f"got {wanted} directions of {layer.target} for phi, but its {path} has {num_found}. "
            "Use smaller -i and -j, or leave them out"
        )
    most = max(min(layer.num_directions, MAX_DIRECTIONS), wanted or 0)
    return right[:, :most], left[:, :most]


def _grid(first: Tensor, second: Tensor) -> Grid:
    return tuple(_digits(row) for row in phi_grid(first, second.to(first.device)))


def _digits(values: Tensor) -> tuple[float, ...]:
    """Rounded to six digits, so that JSON files stay readable."""
    return tuple(float(f"{value:.6g}") for value in values.tolist())
