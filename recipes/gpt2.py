"""GPT-2 (124 M), small enough for any machine.

Needs 2.08 GiB on a CUDA card with 16,384 tokens at a time, 933 MiB with one row of 1,024, and
0.787 GFLOP a token: estimates by formula, printed by `qlora-lite plan recipes/gpt2.py`. The weights
are a download of 0.5 GB. GPT-2 has no chat template: conversations use the plain template, and each
answer ends with the end-of-text token.
"""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(model="openai-community/gpt2", quant=NF4()),
    adapter=LoRA(rank=32, alpha=64, targets="all-linear"),
    data=Data(train="data/train.jsonl", max_tokens=1024),
    optim=Optim(lr=5e-4, tokens_per_step=16_384, epochs=1),
    budget="4GiB",
    output="runs/gpt2",
)

if __name__ == "__main__":
    main(recipe)
