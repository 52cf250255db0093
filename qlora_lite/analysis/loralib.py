"""Adapters of loralib, the code of the LoRA paper (microsoft/LoRA): pairs out of a state dict.

    layer          lora_A         lora_B          delta
    Linear         (r, d_in)      (d_out, r)      s B A
    MergedLinear   (n r, d_in)    (n d_out, r)    s B_k A_k for each of its n parts: q, k, v

`loralib.lora_state_dict` saves factors only, so s = alpha / r is not in the file. Which of the rows
of a fused weight the n parts stand for is not either (`enable_lora`): they are told apart by their
number. Weights that stand beside the factors are not used: loralib adds the delta to them whenever
a model is in evaluation.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.adapters.layer import Factors
from qlora_lite.foundation.errors import AdapterError

SUFFIXES = (".pt", ".pth", ".bin")
WRAPPERS = ("model_state_dict", "state_dict")
"""Keys under which training scripts, the paper's own among them, keep the state dict."""

_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
)
"""What torch's reader makes of a file that is cut, changed, or no pickle at all."""


@dataclass(frozen=True)
class LoralibPair:
    """The pair of one weight, or of one part of a fused one."""

    path: str
    """Of the module."""
    factors: Factors
    """With the scale in `up` if alpha is known, without any otherwise."""
    part: int = 0
    num_parts: int = 1

    @property
    def name(self) -> str:
        """The path, with the number of the part where there is more than one: `h.0.c_attn[1]`."""
        return self.path if self.num_parts == 1 else f"{self.path}[{self.part}]"


def read_loralib(file: Path, alpha: float | None = None) -> list[LoralibPair]:
    """All pairs of a checkpoint, in the order of the file. No code of the file is run.

    Args:
        alpha: of the training; the pairs are without their scale if it is not known.

    Raises:
        AdapterError: if the file is damaged, holds no factors, or factors that do not fit.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in _state_dict(file).items():
        match = re.fullmatch(r"(.+)\.lora_(A|B)", str(name))
        if match and isinstance(value, Tensor):
            halves.setdefault(match[1], {})[match[2]] = value
    if not halves:
        raise AdapterError(
            f"{file} is no loralib checkpoint: no tensor in it is named `...lora_A` or "
            "`...lora_B`. Give what torch.save(loralib.lora_state_dict(model), file) wrote, or the "
            "directory of a PEFT adapter"
        )
    return [pair for path, half in halves.items() for pair in _pairs(file, path, half, alpha)]


def _state_dict(file: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise AdapterError(
            f"{file} cannot be read as a state dict ({type(error).__name__}): it is damaged, or "
            "holds objects beside tensors, whose code is not run here. Copy it again, or save it "
            "with torch.save(loralib.lora_state_dict(model), file)"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content if isinstance(content, Mapping) else {}


def _pairs(
    file: Path, path: str, half: Mapping[str, Tensor], alpha: float | None
) -> list[LoralibPair]:
    """The pair of a Linear, or those of a MergedLinear."""
    if half.keys() != {"A", "B"}:
        raise AdapterError(
            f"{file} has only lora_{next(iter(half))} of {path}. It is damaged: save it again"
        )
    a, b = half["A"].float(), half["B"].float()
    num_parts = _num_parts(a, b)
    if num_parts is None:
        raise AdapterError(
            f"{file}: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}. Needed are "
            "(r, d_in) and (d_out, r) of a Linear, or (n r, d_in) and (n d_out, r) of a "
            "MergedLinear with n parts; of other layers give the PEFT adapter"
        )
    scale = 1.0 if alpha is None else alpha / b.shape[1]
    downs, ups = a.chunk(num_parts), (scale * b).chunk(num_parts)
    return [
        LoralibPair(path, Factors(down, up), part, num_parts)
        for part, (down, up) in enumerate(zip(downs, ups, strict=True))
    ]


def _num_parts(a: Tensor, b: Tensor) -> int | None:
    """How many parts these factors have; None if they are neither layer's."""
    if a.dim() != 2 or b.dim() != 2 or not a.numel() or not b.numel() or len(a) % b.shape[1]:
        return None
    num_parts = len(a) // b.shape[1]
    return num_parts if len(b) % num_parts == 0 else None
