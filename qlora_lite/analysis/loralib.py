"""Read adapters of loralib, the code of the LoRA paper (microsoft/LoRA), from a state dict.

    layer          lora_A         lora_B          delta
    Linear         (r, d_in)      (d_out, r)      s B A
    MergedLinear   (n r, d_in)    (n d_out, r)    s B_k A_k for each of its n parts: q, k, v

`loralib.lora_state_dict` saves factors only, so s = alpha / r is not in the file. Neither is
`enable_lora`, which rows of a fused weight the n parts belong to; parts are numbered instead.
Weights in the file are not used: in evaluation mode loralib adds the delta to them.
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
"""Keys under which training scripts, such as those of the paper, store the state dict."""

_READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
)
"""Raised by `torch.load` for a file that is truncated, changed, or not a pickle."""


@dataclass(frozen=True)
class LoralibPair:
    """The pair of one weight, or of one part of a fused weight."""

    path: str
    """Module path."""
    factors: Factors
    """`up` includes the scale if alpha is known."""
    part: int = 0
    num_parts: int = 1

    @property
    def name(self) -> str:
        """The path, with the part number if there are several parts: `h.0.c_attn[1]`."""
        return self.path if self.num_parts == 1 else f"{self.path}[{self.part}]"


def read_loralib(file: Path, alpha: float | None = None) -> list[LoralibPair]:
    """All pairs of a checkpoint, in the order of the file. Does not run code from the file.

    Args:
        alpha: LoRA alpha of the training; without it the pairs are not scaled.

    Raises:
        AdapterError: if the file is damaged, or has no factors or factors that do not fit.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in _state_dict(file).items():
        match = re.fullmatch(r"(.+)\.lora_(A|B)", str(name))
        if match and isinstance(value, Tensor):
            halves.setdefault(match[1], {})[match[2]] = value
    if not halves:
        raise AdapterError(
            f"{file} is not a loralib checkpoint: it has no tensors named `...lora_A` or "
            "`...lora_B`. Give a file written by torch.save(loralib.lora_state_dict(model), file), "
            "or a PEFT adapter directory"
        )
    return [pair for path, half in halves.items() for pair in _pairs(file, path, half, alpha)]


def _state_dict(file: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise AdapterError(
            f"{file} cannot be read as a state dict ({type(error).__name__}): it is damaged, or "
            "contains objects other than tensors, whose code is not run. Copy it again, or save "
            "it with torch.save(loralib.lora_state_dict(model), file)"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content if isinstance(content, Mapping) else {}


def _pairs(
    file: Path, path: str, half: Mapping[str, Tensor], alpha: float | None
) -> list[LoralibPair]:
    """The pair of a Linear, or the pairs of a MergedLinear."""
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
            "MergedLinear with n parts; for other layers give a PEFT adapter"
        )
    scale = 1.0 if alpha is None else alpha / b.shape[1]
    downs, ups = a.chunk(num_parts), (scale * b).chunk(num_parts)
    return [
        LoralibPair(path, Factors(down, up), part, num_parts)
        for part, (down, up) in enumerate(zip(downs, ups, strict=True))
    ]


def _num_parts(a: Tensor, b: Tensor) -> int | None:
    """Number of parts; None if the factors fit neither a Linear nor a MergedLinear."""
    if a.dim() != 2 or b.dim() != 2 or not a.numel() or not b.numel() or len(a) % b.shape[1]:
        return None
    num_parts = len(a) // b.shape[1]
    return num_parts if len(b) % num_parts == 0 else None
