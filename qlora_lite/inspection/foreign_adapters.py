"""Adapters of other trainers (PEFT, loralib): LoRA pairs in memory, and the weights of their base.

| target                  | alpha        | base                                              |
|-------------------------|--------------|---------------------------------------------------|
| PEFT adapter directory  | recorded     | --base, else the recorded one if it is a local    |
|                         |              | directory                                         |
| loralib checkpoint      | --alpha      | --base                                            |
"""

from collections.abc import Mapping
from pathlib import Path

from qlora_lite.adapters.files import NATIVE
from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.peft import PeftAdapter, read_peft
from qlora_lite.adapters.peft_config import CONFIG, read_peft_config
from qlora_lite.analysis.findings import Shape
from qlora_lite.analysis.loralib import read_loralib
from qlora_lite.analysis.weights import BaseWeights, Part
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import AdapterError, BaseModelError
from qlora_lite.foundation.files import is_file
from qlora_lite.inspection.deltas import BaseId, Delta, require_finite
from qlora_lite.methods.dora import at_length


class PairDeltas:
    """LoRA pairs in memory, with the weights of the base if it is available.

    Args:
        parts: where the weight of each pair is in the base.
        base: its name, if known.

    Raises:
        AdapterError: if the factors do not form a pair, or the base has no such weight.
    """

    def __init__(
        self,
        target: str,
        what: str,
        pairs: Mapping[str, Factors],
        parts: Mapping[str, Part],
        weights: BaseWeights | None,
        base: str | None,
        notes: list[str],
        is_scaled: bool = True,
    ) -> None:
        self.target, self.what, self.notes, self.is_scaled = target, what, notes, is_scaled
        self.base = BaseId(base, weights.checkpoint.fingerprint if weights else None)
        self.shapes = {path: _shape(target, path, pair) for path, pair in pairs.items()}
        self._pairs, self._weights = pairs, weights
        self._parts = {}
        if weights is not None:
            self._parts = {
                name: part
                for name, part in parts.items()
                if _has_place(target, self.shapes[name], part, weights)
            }
            if lost := len(pairs) - len(self._parts):
                notes.append(
                    f"no norms and amplification for {lost} pairs: they adapt some parts of a "
                    "fused weight, and the file does not record which"
                )

    def read(self, path: str) -> Delta:
        pair, weight = self._pairs[path], None
        if self._weights is not None and path in self._parts:
            weight = self._weights.read(self._parts[path])
        dense = None
        if pair.magnitude is not None:
            if weight is None:
                raise AdapterError(
                    f"{self.target} is a DoRA adapter: its deltas depend on the base weights. Pass "
                    "--base MODEL"
                )
            direction = weight + (pair.up @ pair.down).to(weight.device)
            dense = at_length(direction, pair.magnitude.to(weight.device)) - weight
        delta = Delta(self.shapes[path], pair.rank, pair, dense, weight)
        return require_finite(self.target, path, delta)

    def num_bytes(self, path: str) -> int:
        if self._weights is None or path not in self._parts:
            return 0
        return self._weights.num_bytes(self._parts[path])


def _shape(target: str, path: str, pair: Factors) -> Shape:
    """(d_out, d_in) of a pair; raises AdapterError if the factors do not fit each other."""
    down, up = pair.down, pair.up
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise AdapterError(
            f"{path} of {target} has factors of {tuple(down.shape)} and {tuple(up.shape)}; needed "
            "are (rank, d_in) and (d_out, rank) of a linear layer. The file is damaged, or adapts "
            "other kinds of layers: save it again without them"
        )
    return up.shape[0], down.shape[1]


def _has_place(target: str, shape: Shape, part: Part, weights: BaseWeights) -> bool:
    """The base has this weight; False if the rows of a fused weight are not known."""
    in_base, (d_out, d_in) = weights.shape(part.path), shape
    if in_base == (part.num * d_out, d_in):
        return True
    if in_base is not None and part.num > 1 and in_base[1] == d_in and in_base[0] % d_out == 0:
        return False
    has = "has no such layer" if in_base is None else f"has {in_base[1]} to {in_base[0]} there"
    raise AdapterError(
        f"{target} adapts {part.path}, from {d_in} to {part.num * d_out} features; the base "
        f"{weights.model} {has}. The adapter was trained on another base: give it with --base"
    )


def open_peft(
    target: str,
    base: str | None,
    rule: DeviceRule,
    notes: list[str],
    trust_remote_code: bool = False,
) -> PairDeltas:
    adapter = _read_peft(Path(target))
    recorded = read_peft_config(Path(target)).base_model_name_or_path
    weights = None
    if base is not None:
        weights = BaseWeights(base, rule, trust_remote_code)
    elif recorded and is_file(Path(recorded) / "config.json"):
        try:
            weights = BaseWeights(recorded, rule)
        except BaseModelError as error:
            notes.append(f"no norms and amplification, its base cannot be read: {error}")
    else:
        named = f" {recorded}" if recorded else ""
        notes.append(f"norms and amplification need the base{named}: --base MODEL")
    if adapter.full_tensors:
        notes.append(f"tensors that were trained whole are not shown: {len(adapter.full_tensors)}")
    found = adapter.embeddings | adapter.layers
    pairs = {path: found[path] for path in sorted(found, key=_in_order_of_depth)}
    parts = {path: Part(path) for path in pairs}
    return PairDeltas(target, "PEFT adapter", pairs, parts, weights, base or recorded, notes)


def _in_order_of_depth(path: str) -> list[tuple[int, str]]:
    """Sort key: layer 2 before layer 10; files are sorted as text."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _read_peft(directory: Path) -> PeftAdapter:
    """`read_peft` with the error messages of this command."""
    is_ours = (directory / NATIVE).is_file()
    has_pairs = (directory / CONFIG).is_file()
    if is_ours and not (has_pairs and not read_peft_config(directory).use_dora):
        raise AdapterError(
            f"{directory} has no plain LoRA pairs; its deltas need the base and the recipe of the "
            f"run. Give the run: {directory.resolve().parent}"
        )
    adapter = read_peft(directory)
    if not adapter.layers and not adapter.embeddings:
        raise AdapterError(
            f"{directory} has no LoRA pair. Give an adapter of linear layers or of an embedding"
        )
    return adapter


def open_loralib(
    target: str,
    base: str | None,
    alpha: float | None,
    rule: DeviceRule,
    trust_remote_code: bool = False,
) -> PairDeltas:
    found = {pair.name: pair for pair in read_loralib(Path(target), alpha)}
    notes = []
    if alpha is None:
        notes.append(
            "the file does not record alpha: singular values are relative to the largest of their "
            "layer, and there are no norms. Give --alpha"
        )
    elif base is None:
        notes.append("norms and amplification need the base: --base MODEL")
    return PairDeltas(
        target,
        "loralib checkpoint",
        {name: pair.factors for name, pair in found.items()},
        {name: Part(pair.path, pair.part, pair.num_parts) for name, pair in found.items()},
        None if base is None else BaseWeights(base, rule, trust_remote_code),
        base,
        notes,
        is_scaled=alpha is not None,
    )
