"""Qwen3 8B on one 24 GB card.

Needs 21.0 GiB on a CUDA card with 24,576 tokens at a time, 8.21 GiB with one row of 2,048, and
47.2 GFLOP a token: estimates by formula, printed by `qlora-lite plan recipes/qwen3_8b.py`. The
weights are a download of 16.4 GB, which is loaded tensor by tensor. A variant of `qwen3_0_6b.py`.
"""

from qwen3_0_6b import recipe as small

from qlora_lite import main

recipe = small.but(
    "base.model=Qwen/Qwen3-8B",
    "adapter.rank=16",
    "adapter.alpha=32",
    "optim.lr=2e-4",
    "budget=22GiB",
    "output=runs/qwen3-8b",
)

if __name__ == "__main__":
    main(recipe)
