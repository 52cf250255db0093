"""The JSON files of a run as typed models: what its other parts may rely on.

Fields that are not listed are ignored here; the files may have more.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qlora_lite.foundation.json_files import Count, JsonFile, NonNegative

Dtype = Literal["fp32", "bf16", "fp16"]


class Computing(JsonFile):
    """How a run computes: chosen when it starts, and kept."""

    device: Literal["cpu", "cuda"]
    compute: Dtype
    products: Literal["torch", "onednn"] = "torch"


class RunRecord(JsonFile):
    """`recipe.json` of a run."""

    recipe: dict[str, Any]
    fingerprints: dict[str, str]
    micro_batch_tokens: Annotated[int, Field(ge=1, le=2**40)] | None
    scored_rows: Annotated[int, Field(ge=0)] | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    threads: int | None = None
    device: str | None = None
    computing: Computing | None = None
    git_revision: str | None = None


class SidecarBase(JsonFile):
    """The base in `adapter/qlora_lite.json`."""

    model: str
    revision: str | None = None
    fingerprint: str
    compute: Dtype
    storage: Dtype
    norms: Dtype


class Sidecar(JsonFile):
    """`adapter/qlora_lite.json` of a run."""

    recipe: dict[str, Any]
    adapter: dict[str, Any]
    base: SidecarBase
    data_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16,}$")]
    steps: Count
    scores: dict[str, NonNegative]
    predicted_peak_bytes: Count
    peak_bytes: Count

    @field_validator("scores")
    @classmethod
    def _are_both_or_none(cls, scores: dict[str, float]) -> dict[str, float]:
        if scores and not {"loss", "loss_before"} <= scores.keys():
            raise ValueError("loss and loss_before")
        return scores
