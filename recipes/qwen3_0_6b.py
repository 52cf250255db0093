"""Qwen3 0.6B: a chat model for a small card, or for a long run on CPU.

Needs 6.09 GiB on a CUDA card with 32,768 tokens at a time, 1.90 GiB with one row of 2,048, and
4.48 GFLOP a token: estimates by formula, printed by `qlora-lite plan recipes/qwen3_0_6b.py`. The
weights are a download of 1.2 GB.
"""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(model="Qwen/Qwen3-0.6B", quant=NF4()),
    adapter=LoRA(rank=32, alpha=64, targets="all-linear"),
    data=Data(train="data/train.jsonl", max_tokens=2048),
    optim=Optim(lr=5e-4, tokens_per_step=32_768, epochs=1),
    budget="8GiB",
    output="runs/qwen3-0.6b",
)

if __name__ == "__main__":
    main(recipe)
