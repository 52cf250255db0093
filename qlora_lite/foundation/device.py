"""Where to compute, and in which precision: one function decides, and can say so in one line.

| device                      | compute | embedding, head | norms | adapters | optimizer states |
|-----------------------------|---------|-----------------|-------|----------|------------------|
| CUDA with bf16              | bf16    | bf16            | bf16  | bf16     | 8 bit            |
| CUDA without bf16 (T4, V100)| fp16    | fp16            | fp16  | fp32     | 8 bit            |
| CPU                         | fp32    | bf16            | fp32  | bf16     | 32 bit           |

On a CPU compute is fp32 even where the processor has bf16 units: without them the backward of a
bf16 product is about 80 times slower, and results should not depend on the machine.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from qlora_lite.foundation.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class DeviceRule:
    """What runs where and in which precision."""

    device: torch.device
    compute: torch.dtype
    """Activations, and the dtype that packed weights are dequantised to."""
    storage: torch.dtype
    """Embedding and head at rest."""
    norms: torch.dtype
    adapters: torch.dtype
    """Adapter parameters at rest; they are computed in `compute`."""
    optimizer_states: Literal["32bit", "8bit"]

    @property
    def is_here(self) -> bool:
        """The device is in this machine, not only planned for."""
        return self.device.type != "cuda" or torch.cuda.is_available()

    @property
    def line(self) -> str:
        """The one line that a run prints."""
        if not self.is_here:
            where = "a CUDA card that is not here"
        elif self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        else:
            num = torch.get_num_threads()
            where = f"CPU, {num} {'thread' if num == 1 else 'threads'}"
        return (
            f"{where}: compute {NAMES[self.compute]}, adapters {NAMES[self.adapters]}, "
            f"embedding and head {NAMES[self.storage]}, norms {NAMES[self.norms]}, "
            f"optimizer states {self.optimizer_states}"
        )


def choose(device: str = "auto", compute: str = "auto", *, is_imagined: bool = False) -> DeviceRule:
    """The rule for a device (`auto`, `cpu`, `cuda:1`), and another compute dtype on request.

    Args:
        is_imagined: a plan may be made for a card that is not in this machine; it has bf16 then.

    Raises:
        DeviceError: if the device is not there or is of a kind that was not tested.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device if device == "cpu" else device.partition(":")[0]
    if kind == "cpu" and compute == "fp16":
        raise DeviceError(
            "got compute=fp16 on a CPU; its small gradients need the loss scaling of CUDA. "
            "Take base.compute=auto, which is fp32 here"
        )
    if kind not in ("cpu", "cuda"):
        raise DeviceError(
            f"got device {device!r}; cpu and cuda are supported. "
            "Take device=cpu, or a machine with a CUDA card"
        )
    if kind == "cuda" and not torch.cuda.is_available() and not is_imagined:
        raise DeviceError(
            f"got device {device!r}, but this PyTorch ({torch.__version__}) sees no CUDA card. "
            "Take device=cpu, or install a CUDA build of PyTorch and its driver"
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
