"""Every method: its settings class and its `Method` class. A new method is one line."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.methods.adalora import AdaLoRA, AdaLoRAMethod
from qlora_lite.methods.ba_lora import BALoRA, BALoRAMethod
from qlora_lite.methods.cola import COLA, COLAMethod
from qlora_lite.methods.dora import DoRA, DoRAMethod
from qlora_lite.methods.dylora import DyLoRA, DyLoRAMethod
from qlora_lite.methods.loftq import LoftQ, LoftQMethod
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.methods.lora_mini import LoRAMini, LoRAMiniMethod
from qlora_lite.methods.lora_plus import LoRAPlus
from qlora_lite.methods.melora import MELoRA, MELoRAMethod
from qlora_lite.methods.mora import MoRA, MoRAMethod
from qlora_lite.methods.olora import OLoRA, OLoRAMethod
from qlora_lite.methods.pissa import PiSSA, PiSSAMethod
from qlora_lite.methods.prilora import PRILoRA, PRILoRAMethod
from qlora_lite.methods.rm_lora import RMLoRA, RMLoRAMethod
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.methods.sora import SoRA, SoRAMethod
from qlora_lite.methods.xgblora import XGBLoRA, XGBLoRAMethod

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
    """The settings of any method, selected by `kind`."""


def method_for(settings: AdapterSettings) -> Method:
    """The method that these settings belong to."""
    return METHODS[type(settings)](settings)
