"""How frozen weights are stored: NF4, FP4, int8, or unquantised.

4-bit weights: blocks of the flattened weight share one fp32 scale. Double quantisation stores these
scales in 8 bits, in blocks of 256 that share one fp32 scale (Dettmers et al. 2023,
arXiv:2305.14314, section 3). int8: one fp32 scale per row, and weight-only: codes are multiplied by
their scales, then by the input in the compute dtype.
"""

from typing import Annotated, Literal

from pydantic import Field

from qlora_lite.foundation.settings import Settings

BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

NESTED_BLOCK_SIZE = 256
"""Block scales that share one scale under double quantisation, fixed by bitsandbytes."""


class FourBit(Settings):
    """Two weights per byte, in blocks that share a scale."""

    kind: Literal["nf4", "fp4"]

    double_quant: bool = True
    """Quantise the block scales too: saves 0.37 bits per weight at block size 64."""

    block_size: BlockSize = 64
    """Weights that share one scale."""


class NF4(FourBit):
    """4-bit normal float: its 16 values are quantiles of a normal distribution."""

    kind: Literal["nf4"] = "nf4"


class FP4(FourBit):
    """4-bit floating point: sign, two bits of exponent, one of mantissa."""

    kind: Literal["fp4"] = "fp4"


class Int8(Settings):
    """8-bit integers with one scale per output row; products are computed in the compute dtype."""

    kind: Literal["int8"] = "int8"


class BF16(Settings):
    """Unquantised, in bfloat16."""

    kind: Literal["bf16"] = "bf16"


class FP32(Settings):
    """Unquantised, in float32; embedding and head too."""

    kind: Literal["fp32"] = "fp32"


Quant = Annotated[NF4 | FP4 | Int8 | BF16 | FP32, Field(discriminator="kind")]
