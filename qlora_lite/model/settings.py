"""The settings of the frozen base: which model, and in what form it is loaded."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from qlora_lite.foundation.settings import Settings, UserPath, kind_of_name
from qlora_lite.model.quant import NF4, Quant


class Base(Settings):
    """The frozen base model."""

    model: UserPath
    """A directory, a GGUF file, or a hub id such as `Qwen/Qwen3-8B`."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    quant: Annotated[Quant, BeforeValidator(kind_of_name)] = NF4()
    """Quantisation of the linear layers: nf4, fp4, int8, bf16 or fp32."""

    head: Literal["16bit", "int8", "nf4"] = "16bit"
    """Quantisation of an untied output head."""

    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of activations; `auto` is bf16 where that is fast, else fp32 on CPU and fp16 on
    CUDA."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` is the fastest one in torch for the architecture."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read it first."""
