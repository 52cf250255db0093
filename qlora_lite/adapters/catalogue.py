"""Every method: its settings, and the class that carries them out. A new method is one line."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qlora_lite.adapters.lora import LoRA, LoRAMethod
from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.adapters.rslora import RsLoRA

METHODS: dict[type[AdapterSettings], type[Method]] = {
    LoRA: LoRAMethod,
    RsLoRA: LoRAMethod,
}

if TYPE_CHECKING:
    Adapter = AdapterSettings
else:
    Adapter = Annotated[functools.reduce(operator.or_, METHODS), Field(discriminator="kind")]
    """The settings of any method, told apart by `kind`."""


def method_for(settings: AdapterSettings) -> Method:
    """The method that carries out these settings."""
    return METHODS[type(settings)](settings)
