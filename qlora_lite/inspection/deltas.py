"""What an adapter adds to each weight, one layer at a time.

`RunDeltas` rebuilds the layers of a run from its files and its base as a merge does, so it has the
deltas of every method and the weights as used in training. Adapters of other trainers are in
`foreign_adapters.py`.

An embedding is treated as a linear layer from tokens to features: its delta has the shape (hidden,
vocabulary).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.method import Requirement
from qlora_lite.analysis.findings import Shape
from qlora_lite.analysis.rank import SVD, gate_values, svd_of_dense, svd_of_pair
from qlora_lite.export.trained_layers import MergeSource, TrainedLayers
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.merging import merge_source


@dataclass(frozen=True)
class Delta:
    """What is added to one weight, and that weight if it is known."""

    shape: Shape
    rank: int
    """Rank of the adapter at this layer."""
    pair: Factors | None
    """The delta as a folded LoRA pair."""
    dense: Tensor | None
    """(d_out, d_in) if the pair is missing or not exact; otherwise None."""
    weight: Tensor | None
    """(d_out, d_in) in fp32, if the base is available."""
    gates: Tensor | None = None

    @property
    def is_pair_trained(self) -> bool:
        """The pair consists of the trained factors; it was not folded into a larger one."""
        return self.pair is not None and self.pair.rank == self.rank

    def svd(self) -> SVD:
        """The SVD of the delta, from its factors if possible."""
        if self.dense is not None:
            return svd_of_dense(self.dense)
        assert self.pair is not None
        return svd_of_pair(self.pair.down, self.pair.up)


@dataclass(frozen=True)
class BaseId:
    """What is known about the base of an adapter."""

    name: str | None
    """Hub id or directory, as recorded."""
    fingerprint: str | None
    """Of its files, if known."""

    def differs_from(self, other: "BaseId") -> bool:
        """Compare fingerprints if both are known, else names; unknown bases do not differ."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint != other.fingerprint
        return bool(self.name and other.name) and self.name != other.name


class Deltas(Protocol):
    """The deltas of one target, computed one layer at a time."""

    target: str
    """As given by the user."""
    what: str
    """Kind of target, for the output."""
    base: BaseId
    notes: list[str]
    is_scaled: bool
    """False if the scale of the deltas is not known."""
    shapes: dict[str, Shape]
    """By layer path, in the order of the model or file."""

    def read(self, path: str) -> Delta: ...

    def num_bytes(self, path: str) -> int:
        """Bytes read from the base for this layer."""


def require_finite(target: str, path: str, delta: Delta) -> Delta:
    """Return the delta if all its numbers are finite.

    Raises:
        AdapterError: if a tensor holds NaN or infinity.
    """
    pair = () if delta.pair is None else (delta.pair.down, delta.pair.up)
    for tensor in (*pair, delta.dense, delta.weight):
        if tensor is not None and not tensor.isfinite().all():
            raise AdapterError(
                f"{path} of {target} has values that are not finite: its training diverged, or the "
                "file or its base is damaged. Use an earlier checkpoint, or copy the file again"
            )
    return delta


class RunDeltas:
    """The layers of a finished run."""

    is_scaled = True

    def __init__(self, target: str, source: MergeSource, notes: list[str]) -> None:
        self._trained = TrainedLayers(source, "trained")
        self.target = target
        self.what = f"run, adapter={source.adapter.kind}"
        self.base = BaseId(source.base.model, self._trained.checkpoint.fingerprint)
        self.shapes = _shapes(self._trained)
        self.notes = notes + _notes(self._trained)

    def read(self, path: str) -> Delta:
        is_embedding = path in self._trained.parts.embeddings
        delta = (_embedding_delta if is_embedding else _layer_delta)(self._trained, path)
        return require_finite(self.target, path, delta)

    def num_bytes(self, path: str) -> int:
        return self._trained.num_bytes(f"{path}.weight")


def open_run(
    target: str, rule: DeviceRule, notes: list[str], trust_remote_code: bool = False
) -> RunDeltas:
    """Raises RunError if this is not a finished run, or its files are damaged."""
    folder = RunFolder(Path(target))
    recipe = folder.trained_recipe(trust_remote_code=trust_remote_code)
    return RunDeltas(target, merge_source(folder, recipe, rule), notes)


def _shapes(trained: TrainedLayers) -> dict[str, Shape]:
    tables = {
        path: (len(saved["b"]), saved["a"].shape[1])
        for path, saved in trained.parts.embeddings.items()
    }
    return tables | {s.path: (s.d_out, s.d_in) for s in trained.parts.plan.specs}


def _notes(trained: TrainedLayers) -> list[str]:
    notes = []
    if Requirement.ORIGINAL_WEIGHTS in trained.method.requires:
        notes.append(
            "its method took its start out of the weights before quantisation. The delta is what "
            "is added to the remainder, and the weight is that remainder"
        )
    if num_full := len(trained.parts.full_parameters):
        notes.append(f"fully trained tensors are not shown: {num_full}")
    return notes


def _layer_delta(trained: TrainedLayers, path: str) -> Delta:
    layer = trained.layer(path)
    pair = layer.factors()
    is_complete = pair is not None and pair.magnitude is None and pair.relative_error == 0
    return Delta(
        shape=(layer.base.d_out, layer.base.d_in),
        rank=trained.parts.plan.layers[path].rank,
        pair=pair,
        dense=None if is_complete else layer.delta().detach(),
        weight=layer.base.dense().float(),
        gates=gate_values(layer),
    )


def _embedding_delta(trained: TrainedLayers, path: str) -> Delta:
    """As a layer from tokens to features: tokens are the columns."""
    rows = trained.embedding_pair(path)
    pair = Factors(down=rows.up.T, up=rows.down.T)
    name = f"{path}.weight"
    table = torch.cat(list(trained.unquantised(name, trained.stored_name(name))))
    return Delta((len(pair.up), pair.down.shape[1]), pair.rank, pair, None, table.T)
