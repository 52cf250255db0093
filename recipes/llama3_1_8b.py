"""Llama 3.1 8B Instruct on one 24 GB card.

Needs 21.1 GiB on a CUDA card with 26,624 tokens at a time, 7.79 GiB with one row of 2,048, and
46.7 GFLOP a token: estimates by formula, printed by `qlora-lite plan recipes/llama3_1_8b.py`. The
weights are a download of 16.1 GB. They are gated: accept the licence on the model's page, then log
in with `hf auth login`.
"""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(model="meta-llama/Llama-3.1-8B-Instruct", quant=NF4()),
    adapter=LoRA(rank=16, alpha=32, targets="all-linear"),
    data=Data(train="data/train.jsonl", max_tokens=2048),
    optim=Optim(lr=2e-4, tokens_per_step=32_768, epochs=1),
    budget="22GiB",
    output="runs/llama3.1-8b",
)

if __name__ == "__main__":
    main(recipe)
