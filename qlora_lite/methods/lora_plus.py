"""LoRA+: B learns faster than A.

    lr(B) = lambda lr(A),   lambda = 16

Hayou et al. 2024, arXiv:2402.12354: with one rate for both, features are learned inefficiently as
the width grows. A preset of LoRA; `lr_ratio` is a field of every method, by role: up factors, gates
and magnitudes move at the higher rate. Take a lower `optim.lr` than for LoRA.
"""

from typing import Literal

from pydantic import Field

from qlora_lite.adapters.method import AdapterSettings


class LoRAPlus(AdapterSettings):
    """LoRA with a higher learning rate for B."""

    kind: Literal["lora_plus"] = "lora_plus"

    lr_ratio: float = Field(default=16.0, gt=0)
    """Learning rate of the up factors relative to the down factors."""
