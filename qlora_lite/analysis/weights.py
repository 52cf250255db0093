"""Read the weights of a base from its files, one at a time, without loading a model.

Weights are not rounded; those of a quantised checkpoint are dequantised.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.analysis.findings import Shape
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.model.base_files import locate, open_checkpoint
from qlora_lite.model.facts import read_facts
from qlora_lite.model.frozen import Scratch
from qlora_lite.model.prequantised import is_packed, read_packed
from qlora_lite.model.settings import Base
from qlora_lite.model.shape import ParameterShape


@dataclass(frozen=True)
class Part:
    """A weight of a model, or one of `num` equal parts of its rows."""

    path: str
    index: int = 0
    num: int = 1


class BaseWeights:
    """The weight matrices of a model, read one at a time."""

    def __init__(self, model: str, rule: DeviceRule, trust_remote_code: bool = False) -> None:
        base = Base(model=model, trust_remote_code=trust_remote_code)
        facts = read_facts(base)
        shape = facts.shape
        self.model = model
        self.checkpoint = open_checkpoint(locate(base), facts)
        names = facts.match_names(self.checkpoint.names)
        self._stored_names = {ours: stored for stored, ours in names.items()}
        self._rule = rule
        self._decoder = shape.blocks.partition(".")[0]
        matrices = [p for p in shape.parameters if len(p.shape) == 2]
        self._matrices = {p.module: p for p in matrices if p.name.endswith(".weight")}

    def shape(self, path: str) -> Shape | None:
        """Shape of the weight at `path`; None if there is none."""
        p = self._find(path)
        if p is None:
            return None
        return (p.d_in, p.d_out) if p.role == "embedding" else (p.d_out, p.d_in)

    def read(self, part: Part) -> Tensor:
        """The weight, (d_out, d_in) in fp32."""
        p, name = self._find(part.path), self._stored(part.path)
        assert p is not None, part.path
        if is_packed(self.checkpoint, name):
            weight = read_packed(self.checkpoint, name, self._rule, None, Scratch()).dense()
        else:
            stored = self.checkpoint.read(name)
            weight = stored.T if p.transposed or p.role == "embedding" else stored
        rows = len(weight) // part.num
        own = weight[part.index * rows : (part.index + 1) * rows]
        return own.to(self._rule.device, torch.float32)

    def num_bytes(self, part: Part) -> int:
        return self.checkpoint.info(self._stored(part.path)).num_bytes // part.num

    def _find(self, path: str) -> ParameterShape | None:
        spelled = (name for name in self._spellings(path) if name in self._matrices)
        return self._matrices.get(next(spelled, path))

    def _stored(self, path: str) -> str:
        p = self._find(path)
        assert p is not None, path
        return self._stored_names[p.tied_to or p.name]

    def _spellings(self, name: str) -> tuple[str, str, str]:
        """With and without the prefix of the decoder: checkpoints differ in this."""
        return name, f"{self._decoder}.{name}", name.removeprefix(f"{self._decoder}.")
