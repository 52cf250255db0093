"""The embedded model (1.2 M) on the embedded data: runs offline.

Needs 720 MiB on CPU with 2,048 tokens at a time, 649 MiB with one row of 256 (Python and its
libraries take most of it), and 0.00872 GFLOP a token: estimates by formula, printed by
`qlora-lite plan recipes/demo.py`. The model learns to describe an object of the standard library in
one sentence.
"""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main
from qlora_lite.demo import BASE, HELDOUT, TRAIN

recipe = Recipe(
    base=Base(model=BASE, quant=NF4()),
    adapter=LoRA(rank=16, alpha=32, targets="all-linear"),
    data=Data(train=TRAIN, heldout=HELDOUT, max_tokens=256),
    optim=Optim(lr=2e-3, tokens_per_step=2048, epochs=1),
    output="runs/demo",
)

if __name__ == "__main__":
    main(recipe)
