"""Every method: its settings, and the class that carries them out. A new method is one line."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qlora_lite.adapters.adalora import AdaLoRA, AdaLoRAMethod
from qlora_lite.adapters.ba_lora import BALoRA, BALoRAMethod
from qlora_lite.adapters.cola import COLA, COLAMethod
from qlora_lite.adapters.dora import DoRA, DoRAMethod
from qlora_lite.adapters.dylora import DyLoRA, DyLoRAMethod
from qlora_lite.adapters.loftq import LoftQ, LoftQMethod
from qlora_lite.adapters.lora import LoRA, LoRAMethod
from qlora_lite.adapters.lora_mini import LoRAMini, LoRAMiniMethod
from qlora_lite.adapters.lora_plus import LoRAPlus
from qlora_lite.adapters.melora import MELoRA, MELoRAMethod
from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.adapters.mora import MoRA, MoRAMethod
from qlora_lite.adapters.olora import OLoRA, OLoRAMethod
from qlora_lite.adapters.pissa import PiSSA, PiSSAMethod
from qlora_lite.adapters.prilora import PRILoRA, PRILoRAMethod
from qlora_lite.adapters.rm_lora import RMLoRA, RMLoRAMethod
from qlora_lite.adapters.rslora import RsLoRA
from qlora_lite.adapters.sora import SoRA, SoRAMethod
from qlora_lite.adapters.xgblora import XGBLoRA, XGBLoRAMethod

METHODS: dict[type[AdapterSettings], type[Method]] = {
    LoRA: LoRAMethod,
    RsLoRA: LoRAMethod,
    LoRAPlus: LoRAMethod,
    DoRA: DoRAMethod,
    PiSSA: PiSSAMethod,
    OLoRA: OLoRAMethod,
    LoftQ: LoftQMethod,
    DyLoRA: DyLoRAMethod,
    AdaLoRA: AdaLoRAMethod,
    SoRA: SoRAMethod,
    PRILoRA: PRILoRAMethod,
    MELoRA: MELoRAMethod,
    MoRA: MoRAMethod,
    LoRAMini: LoRAMiniMethod,
    COLA: COLAMethod,
    XGBLoRA: XGBLoRAMethod,
    RMLoRA: RMLoRAMethod,
    BALoRA: BALoRAMethod,
}

if TYPE_CHECKING:
    Adapter = AdapterSettings
else:
    Adapter = Annotated[functools.reduce(operator.or_, METHODS), Field(discriminator="kind")]
    """The settings of any method, told apart by `kind`."""


def method_for(settings: AdapterSettings) -> Method:
    """The method that carries out these settings."""
    return METHODS[type(settings)](settings)
