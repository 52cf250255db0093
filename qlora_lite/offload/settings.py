"""What DeepSpeed ZeRO divides among processes, and what it keeps outside the device.

| kind  | every process has its share of                        |
|-------|-------------------------------------------------------|
| none  | nothing: each has the whole model                     |
| zero1 | the optimizer's states                                |
| zero2 | the states and the gradients                          |
| zero3 | the states, the gradients and the frozen base         |

(Rajbhandari et al. 2020, arXiv:1910.02054). Trained parameters are kept in fp32.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora_lite.foundation.files import read_object
from qlora_lite.foundation.settings import Settings, kind_of_name

Place = Literal["none", "cpu", "nvme"]


class NoOffload(Settings):
    """Everything on the device, in every process."""

    kind: Literal["none"] = "none"

    config: str | None = None
    """A DeepSpeed JSON file: the kind is then its stage."""


class ZeRO(Settings):
    """What all stages have."""

    kind: Literal["zero1", "zero2", "zero3"]

    pin_memory: bool = True
    """Pin host memory that is copied to a CUDA card. No effect on a CPU."""

    bucket_size: int | None = Field(default=None, ge=1)
    """Numbers per communication, 4 bytes of memory each; by default as many as are trained, at most
    50 million."""

    config: str | None = None
    """A DeepSpeed JSON file; its values replace those that follow from the settings above."""

    @property
    def stage(self) -> int:
        return int(self.kind[-1])

    @property
    def places(self) -> tuple[Place, Place]:
        """Where the optimizer's states and the base's weights are."""
        return getattr(self, "optimizer", "none"), getattr(self, "parameters", "none")


class ZeRO1(ZeRO):
    """Optimizer states are divided among the processes."""

    kind: Literal["zero1"] = "zero1"

    optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's states are: on the device, or in host memory."""


class ZeRO2(ZeRO):
    """Optimizer states and gradients are divided among the processes."""

    kind: Literal["zero2"] = "zero2"

    optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's states are: on the device, or in host memory."""


class ZeRO3(ZeRO):
    """Optimizer states, gradients and the frozen base are divided among the processes."""

    kind: Literal["zero3"] = "zero3"

    optimizer: Place = "none"
    """Where the optimizer's states are: on the device, in host memory, or on a disk."""

    parameters: Place = "none"
    """Where the base's weights are while a layer does not use them."""

    nvme_path: str | None = None
    """A folder on a fast disk, for `nvme`."""

    @model_validator(mode="after")
    def _has_a_folder_for_nvme(self) -> "ZeRO3":
        if "nvme" in self.places and self.nvme_path is None and self.config is None:
            raise ValueError("nvme needs a folder on a fast disk. Set offload.nvme_path")
        return self


Offload = Annotated[NoOffload | ZeRO1 | ZeRO2 | ZeRO3, Field(discriminator="kind")]


def with_kind(value: Any) -> Any:
    """`"zero3"` as `{"kind": "zero3"}`; of a DeepSpeed file alone, the kind is its stage."""
    value = value.model_dump() if isinstance(value, NoOffload) else kind_of_name(value)
    if not isinstance(value, dict) or value.get("kind", "none") != "none":
        return value
    config = value.get("config")
    if not isinstance(config, str):
        return value
    return {**value, "kind": f"zero{_stage_of(Path(config))}"}


def _stage_of(path: Path) -> int:
    try:
        section = read_object(path, "zero_optimization")["zero_optimization"]
        stage = section["stage"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not a DeepSpeed file with a zero_optimization.stage ({error}). "
            "Set offload to zero1, zero2 or zero3"
        ) from None
    if stage not in (1, 2, 3):
        raise ValueError(f"{path} has zero_optimization.stage={stage!r}; 1, 2 and 3 are supported")
    return int(stage)
