"""With its special part turned off, a method equals the one that it extends."""

import pytest

from qlora_lite.methods.ba_lora import BALoRA
from qlora_lite.methods.cola import COLA
from qlora_lite.methods.dylora import DyLoRA
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.lora_plus import LoRAPlus
from qlora_lite.methods.melora import MELoRA
from qlora_lite.methods.pissa import PiSSA
from qlora_lite.methods.prilora import PRILoRA
from qlora_lite.methods.rm_lora import RMLoRA
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.methods.xgblora import XGBLoRA
from tests.tiny import save_tiny
from tests.workbench import Bench

STEPS = 6
BITS, SUMS = 0.0, 1e-6
"""Tolerances: the same kernels run, or a product is computed in another way."""

NEUTRAL = {
    "rslora": (RsLoRA(rank=4, alpha=3.0), LoRA(rank=4, alpha=6.0), BITS),
    "lora_plus": (LoRAPlus(rank=4, lr_ratio=1.0), LoRA(rank=4), BITS),
    "melora": (MELoRA(rank=4, num_blocks=1, dropout=0), LoRA(rank=4, alpha=16), SUMS),
    "dylora": (DyLoRA(rank=4, alpha=8, min_rank=4), LoRA(rank=4, alpha=8), BITS),
    "prilora": (
        PRILoRA(first_rank=4, last_rank=4, alpha=8, prune_share=0),
        LoRA(rank=4, alpha=8),
        BITS,
    ),
    "cola": (COLA(rank=4, alpha=8, num_links=1), LoRA(rank=4, alpha=8), BITS),
    "rm_lora": (
        RMLoRA(rank=4, alpha=8, num_drawn=4, orthogonality=0),
        LoRA(rank=4, alpha=8),
        BITS,
    ),
    "xgblora": (
        XGBLoRA(rank=4, alpha=8, boost_every=99, num_layers=2),
        LoRA(rank=4, alpha=8),
        BITS,
    ),
    "ba_lora": (
        BALoRA(rank=4, alpha=4, consistency=0, diversity=0, singular=0),
        PiSSA(rank=4, alpha=4),
        BITS,
    ),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_turned_off_it_equals_the_plain_method(tmp_path, name):
    settings, plain, tolerance = NEUTRAL[name]
    directory = save_tiny(tmp_path / "base")
    found, expected = Bench(directory, settings), Bench(directory, plain)
    losses = [(found.step(), expected.step()) for _ in range(STEPS)]
    assert all(abs(a - b) <= tolerance * b for a, b in losses), losses
    assert losses[-1][0] != losses[0][0]
    largest = expected.logits().abs().max()
    assert (found.logits() - expected.logits()).abs().max() <= 10 * tolerance * largest
