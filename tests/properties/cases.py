"""Every method with small settings, and its expected properties: a new method is one line here."""

from dataclasses import dataclass
from typing import Literal

from qlora_lite.adapters.method import AdapterSettings
from qlora_lite.methods.adalora import AdaLoRA
from qlora_lite.methods.ba_lora import BALoRA
from qlora_lite.methods.cola import COLA
from qlora_lite.methods.dora import DoRA
from qlora_lite.methods.dylora import DyLoRA
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.lora_mini import LoRAMini
from qlora_lite.methods.lora_plus import LoRAPlus
from qlora_lite.methods.melora import MELoRA
from qlora_lite.methods.mora import MoRA
from qlora_lite.methods.olora import OLoRA
from qlora_lite.methods.pissa import PiSSA
from qlora_lite.methods.prilora import PRILoRA
from qlora_lite.methods.rm_lora import RMLoRA
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.methods.sora import SoRA
from qlora_lite.methods.xgblora import XGBLoRA


@dataclass(frozen=True)
class Case:
    """A method with settings that fit weights of a few dozen rows."""

    settings: AdapterSettings
    start: Literal["base", "near base", "changed base"] = "base"
    """Output before training: the base's bit for bit, up to rounding, or that of a changed base."""
    peft: bool = True
    """Whether it can be saved as a PEFT adapter without loss."""
    on_model: AdapterSettings | None = None
    """Settings for the tiny model, if its widths of 64 and 128 need others."""

    @property
    def model_settings(self) -> AdapterSettings:
        return self.on_model or self.settings


CASES = {
    "lora": Case(LoRA(rank=4, alpha=8)),
    "rslora": Case(RsLoRA(rank=4, alpha=6)),
    "lora_plus": Case(LoRAPlus(rank=4, alpha=8)),
    "dora": Case(DoRA(rank=4, alpha=8, dropout=0.0), start="near base"),
    "pissa": Case(PiSSA(rank=4, alpha=6)),
    "pissa, randomised": Case(PiSSA(rank=4, alpha=6, svd_iterations=4)),
    "pissa, requantised": Case(
        PiSSA(rank=4, alpha=6, mode="requantise"), start="changed base", peft=False
    ),
    "olora": Case(OLoRA(rank=4, alpha=6, dropout=0.0)),
    "olora, requantised": Case(
        OLoRA(rank=4, alpha=6, dropout=0.0, mode="requantise"), start="changed base", peft=False
    ),
    "loftq": Case(LoftQ(rank=4, alpha=6, iterations=2), start="changed base", peft=False),
    "dylora": Case(DyLoRA(rank=4, alpha=6)),
    "dylora, frozen": Case(DyLoRA(rank=4, alpha=6, variant="frozen", eval_rank=3)),
    "adalora": Case(AdaLoRA(rank=4, target_rank=2, alpha=8, warmup=2, final=3, every=1)),
    "sora": Case(SoRA(rank=4, alpha=8, threshold=0.02)),
    "prilora": Case(PRILoRA(first_rank=2, last_rank=4, alpha=8, prune_every=3)),
    "cola": Case(COLA(rank=4, alpha=6, num_links=3, link_ranks=[4, 3, 1])),
    "xgblora": Case(XGBLoRA(alpha=8, boost_every=2, max_bank_rank=3)),
    "rm_lora": Case(RMLoRA(rank=4, alpha=8, num_drawn=2)),
    "melora": Case(
        MELoRA(rank=2, num_blocks=3, dropout=0.0),
        on_model=MELoRA(rank=2, num_blocks=4, dropout=0.0),
    ),
    "mora, type 1": Case(MoRA(rank=4, type=1)),
    "mora, type 6": Case(MoRA(rank=4, type=6), peft=False),
    "mora, restarted": Case(
        MoRA(rank=4, type=1, restart_every=3, restart_warmup=1),
    ),
    "lora_mini": Case(LoRAMini(rank=4)),
    "lora_mini, orthogonal": Case(LoRAMini(rank=4, aux="orthogonal", inner_down=9, inner_up=7)),
    "ba_lora": Case(BALoRA(rank=4, alpha=6, consistency=0.1, diversity=0.1, singular=0.1)),
}

SAME_LAYER = (
    "rslora",
    "lora_plus",
    "pissa, randomised",
    "pissa, requantised",
    "olora",
    "olora, requantised",
    "loftq",
    "rm_lora",
    "ba_lora",
)
"""Once built, these are layers of `lora` or `pissa`: only start, scale or training differ."""

SAME_TRAINING = ("rslora", "lora_plus", "pissa, randomised", "olora, requantised")
"""These train as another case does, with another scale, learning rate or start."""
