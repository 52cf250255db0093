"""rsLoRA: LoRA scaled by alpha / sqrt(r), so that high ranks keep learning.

    y = W x + (alpha / sqrt(r)) B A drop(x)

Kalajdzievski 2023, arXiv:2312.03732: with alpha / r the update and its gradient shrink as the rank
grows. This is a preset of LoRA. Its scale is sqrt(r) times that of LoRA, so high ranks need a lower
learning rate.
"""

from typing import Literal

from qlora_lite.adapters.method import AdapterSettings


class RsLoRA(AdapterSettings):
    """Rank-stabilised LoRA: the scale is alpha/sqrt(r)."""

    kind: Literal["rslora"] = "rslora"

    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/sqrt(r)"
    """Scale of the update."""
