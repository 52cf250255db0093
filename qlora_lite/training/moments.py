"""Adam's state in a checkpoint, under the names of torch or of bitsandbytes' 8-bit optimizer.

| torch                | bitsandbytes                                             |
|----------------------|----------------------------------------------------------|
| `exp_avg`            | `state1`, and `qmap1` and `absmax1` if it is in 8 bit    |
| `exp_avg_sq`         | `state2`, and `qmap2` and `absmax2`                      |
| `step`, a tensor     | `step`, a number                                         |

A run may continue with the other one: ZeRO keeps states in fp32, a card alone in 8 bit by default.
All names have the form `parameter:part`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK_SIZE = 256
"""Of bitsandbytes' 8-bit states."""

_THEIRS = {"exp_avg": "state1", "exp_avg_sq": "state2"}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}


def as_torch(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The state with fp32 moments under torch's names."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        name, _, part = key.rpartition(":")
        if part == "step":
            found[key] = torch.as_tensor(value, dtype=torch.float32)
        elif part in _OURS:
            found[f"{name}:{_OURS[part]}"] = _in_fp32(flat, name, part[-1])
        elif not part.startswith(("qmap", "absmax")):
            found[key] = value
    return found


def as_bitsandbytes(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The state under bitsandbytes' names. Moments in fp32 stay so: it updates both kinds."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        name, _, part = key.rpartition(":")
        if part == "step":
            found[key] = int(value)
        else:
            found[f"{name}:{_THEIRS.get(part, part)}"] = value
    return found


def _in_fp32(flat: Mapping[str, Any], name: str, number: str) -> Tensor:
    state: Tensor = flat[f"{name}:state{number}"]
    if state.dtype != torch.uint8:
        return state
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = flat[f"{name}:absmax{number}"], flat[f"{name}:qmap{number}"]
    return dequantize_blockwise(state, absmax=absmax, code=code, blocksize=_BLOCK_SIZE)
