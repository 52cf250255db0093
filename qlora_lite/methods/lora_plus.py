"""LoRA+: B learns faster than A.

    lr(B) = lambda lr(A),   lambda = 16

Hayou et al. 2024, arXiv:2402.12354: with one learning rate for both, feature learning becomes
inefficient as the width grows. This is a preset of LoRA. Every method has `lr_ratio`: up factors,
gates and magnitudes train at the higher rate. Use a lower `optim.lr` than for LoRA.
"""

from typing import Literal

from pydantic import Field

from qlora_lite.adapters.method import AdapterSettings


class LoRAPlus(AdapterSettings):
    """LoRA with a higher learning rate for B."""

    kind: Literal["lora_plus"] = "lora_plus"

    lr_ratio: float = Field(default=16.0, gt=0)
    """Learning rate of the up factors relative to the down factors."""
