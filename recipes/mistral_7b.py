"""Mistral 7B Instruct v0.3 on one 24 GB card.

Needs 21.8 GiB on a CUDA card with 30,720 tokens at a time, 6.28 GiB with one row of 2,048, and
45.2 GFLOP a token: estimates by formula, printed by `qlora-lite plan recipes/mistral_7b.py`. The
weights are a download of 14.5 GB.
"""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(model="mistralai/Mistral-7B-Instruct-v0.3", quant=NF4()),
    adapter=LoRA(rank=16, alpha=32, targets="all-linear"),
    data=Data(train="data/train.jsonl", max_tokens=2048),
    optim=Optim(lr=2e-4, tokens_per_step=32_768, epochs=1),
    budget="22GiB",
    output="runs/mistral-7b",
)

if __name__ == "__main__":
    main(recipe)
