"""Every method: its settings, and the class that carries them out. A new method is one line."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qlora_lite.adapters.ba_lora import BALoRA, BALoRAMethod
from qlora_lite.adapters.dora import DoRA, DoRAMethod
from qlora_lite.adapters.loftq import LoftQ, LoftQMethod
from qlora_lite.adapters.lora import LoRA, LoRAMethod
from qlora_lite.adapters.lora_mini import LoRAMini, LoRAMiniMethod
from qlora_lite.adapters.lora_plus import LoRAPlus
from qlora_lite.adapters.melora import MELoRA, MELoRAMethod
from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.adapters.mora import MoRA, MoRAMethod
from qlora_lite.adapters.olora import OLoRA, OLoRAMethod
from qlora_lite.adapters.pissa import PiSSA, PiSSAMethod
from qlora_lite.adapters.rslora import RsLoRA

METHODS: dict[type[AdapterSettings], type[Method]] = {
    LoRA: LoRAMethod,
    RsLoRA: LoRAMethod,
    LoRAPlus: LoRAMethod,
    DoRA: DoRAMethod,
    PiSSA: PiSSAMethod,
    OLoRA: OLoRAMethod,
    LoftQ: LoftQMethod,
    BALoRA: BALoRAMethod,
    MELoRA: MELoRAMethod,
    MoRA: MoRAMethod,
    LoRAMini: LoRAMiniMethod,
}

if TYPE_CHECKING:
    Adapter = AdapterSettings
else:
    Adapter = Annotated[functools.reduce(operator.or_, METHODS), Field(discriminator="kind")]
    """The settings of any method, told apart by `kind`."""


def method_for(settings: AdapterSettings) -> Method:
    """The method that carries out these settings."""
    return METHODS[type(settings)](settings)
