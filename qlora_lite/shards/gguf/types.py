"""The tensor types of GGUF: their sizes, and how packed rows are dequantised.

libgguf dequantises. It has no wheel for some platforms (Linux on ARM, Python 3.14); there the numpy
code of gguf is used, which gives the same bits and takes 11 (Q6_K) to 200 times (Q4_K) as long.
F32, F16 and BF16 are used as they are stored.
"""

import functools
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

try:
    import libgguf
except ImportError:
    libgguf = None

NATIVE: ModuleType | None = libgguf
"""libgguf, None where it is not installed."""

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

QUANTISED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0",
)  # fmt: skip

SUPPORTED = (*FLOATS, *QUANTISED)


def kind_of(number: int) -> str:
    """The name of a type by its number in the file."""
    return _names().get(number, f"number {number}")


def block_size(kind: str) -> tuple[int, int]:
    """Weights and bytes of one block."""
    import gguf

    weights, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return weights, num_bytes


def dequantise(kind: str, packed: np.ndarray, out: Tensor) -> None:
    """Dequantise rows of blocks.

    Args:
        packed: (rows, bytes of a row), uint8, contiguous.
        out: (rows, columns), fp32, contiguous.
    """
    rows, columns = out.shape
    if NATIVE is not None:
        number = int(NATIVE.GGMLQuantizationType[kind])
        NATIVE.dequantize_rows_into_raw(number, packed, out.numpy(), rows, columns)
        return
    import gguf

    with np.errstate(all="ignore"):  # scales of damaged blocks may be infinite
        dense = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    out.copy_(torch.from_numpy(dense))


@functools.cache
def _names() -> dict[int, str]:
    import gguf

    return {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
