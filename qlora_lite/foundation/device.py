"""Which device to compute on, and in which precision.

| device                      | compute | embedding, head | norms | adapters | optimizer states |
|-----------------------------|---------|-----------------|-------|----------|------------------|
| CUDA with bf16              | bf16    | bf16            | bf16  | bf16     | 8 bit            |
| CUDA without bf16 (T4, V100)| fp16    | fp16            | fp16  | fp32     | 8 bit            |
| CPU                         | fp32    | bf16            | fp32  | bf16     | 32 bit           |

On a CPU, a run whose `base.compute` is `auto` computes in bf16 if the processor has units for it
(`run/computing.py`): products are then about 4 times as fast. Without them the backward of a bf16
product is about 80 times slower, so everything else computes in fp32.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from qlora_lite.foundation.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

ProductLibrary = Literal["torch", "onednn"]
"""Who multiplies with frozen weights (`kernels/product.py`)."""


@dataclass(frozen=True)
class DeviceRule:
    """The device, and the dtype of each part of the model on it."""

    device: torch.device
    compute: torch.dtype
    """Activations, and the dtype that packed weights are dequantised to."""
    storage: torch.dtype
    """Storage dtype of the embedding and the head."""
    norms: torch.dtype
    adapters: torch.dtype
    """Storage dtype of the adapter parameters; they are cast to `compute` in the forward."""
    optimizer_states: Literal["32bit", "8bit"]
    products: ProductLibrary = "torch"
    reason: str = field(default="", compare=False)
    """Why `compute` and `products` were chosen, if the user did not."""

    @property
    def is_available(self) -> bool:
        """False if the device is only planned for: this machine does not have it."""
        return self.device.type != "cuda" or torch.cuda.is_available()

    @property
    def summary(self) -> str:
        """One line for the user and the record: device and dtypes."""
        if not self.is_available:
            where = "a CUDA card (not in this machine)"
        elif self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        else:
            num = torch.get_num_threads()
            where = f"CPU, {num} {'thread' if num == 1 else 'threads'}"
        by = " by oneDNN" if self.products == "onednn" else ""
        return (
            f"{where}: compute {NAMES[self.compute]}{by}, adapters {NAMES[self.adapters]}, "
            f"embedding and head {NAMES[self.storage]}, norms {NAMES[self.norms]}, "
            f"optimizer states {self.optimizer_states}"
        )

    @property
    def summary_with_reason(self) -> str:
        """`summary`, and why."""
        return f"{self.summary} ({self.reason})" if self.reason else self.summary


def choose(
    device: str = "auto", compute: str = "auto", *, allow_absent: bool = False
) -> DeviceRule:
    """The rule for a device (`auto`, `cpu`, `cuda:1`); `compute` overrides the compute dtype.

    Nothing is measured here: on a CPU, `compute="auto"` is fp32.

    Args:
        allow_absent: accept a card that this machine does not have, for a plan; it is taken to
            have bf16.

    Raises:
        DeviceError: if the device is absent, or its kind is not supported.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device if device == "cpu" else device.partition(":")[0]
    if kind == "cpu" and compute == "fp16":
        raise DeviceError(
            "got compute=fp16 on a CPU: fp16 needs loss scaling, which only runs on CUDA. "
            "Use base.compute=auto, which is bf16 or fp32 here"
        )
    if kind not in ("cpu", "cuda"):
        raise DeviceError(
            f"got device {device!r}; cpu and cuda are supported. "
            "Use device=cpu, or a machine with a CUDA card"
        )
    if kind == "cuda" and not torch.cuda.is_available() and not allow_absent:
        raise DeviceError(
            f"got device {device!r}, but this PyTorch ({torch.__version__}) sees no CUDA card. "
            "Use device=cpu, or install a CUDA build of PyTorch and its driver"
        )
    if kind == "cpu":
        dtype = torch.float32 if compute == "auto" else DTYPES[compute]
        return DeviceRule(
            torch.device("cpu"), dtype, torch.bfloat16, torch.float32, torch.bfloat16, "32bit"
        )
    has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False)
    dtype = (
        (torch.bfloat16 if has_bf16 else torch.float16) if compute == "auto" else DTYPES[compute]
    )
    adapters = torch.float32 if dtype is torch.float16 else torch.bfloat16
    return DeviceRule(torch.device(device), dtype, dtype, dtype, adapters, "8bit")
