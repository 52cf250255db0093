"""One run of the study and its measurements."""

import statistics
from pathlib import Path
from typing import Any

from method_study.results import Values
from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.files import NATIVE
from qlora_lite.adapters.peft import WEIGHTS
from qlora_lite.foundation.errors import TrainingError
from qlora_lite.recipe import Recipe
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics


def train(recipe: Recipe) -> Values:
    """Train, or resume where an earlier call stopped.

    A run that stops (its loss is not finite) is a result too, with the reason in `failed`.
    """
    try:
        result = run_recipe(recipe)
    except TrainingError as error:
        return {"failed": str(error).splitlines()[0]}
    folder = RunFolder(result.directory)
    attached = load_run(folder.path).attached
    assert attached is not None
    return {
        "start": result.scores["loss_before"],
        "loss": result.scores["loss"],
        **_steps(metrics.read(folder.metrics)),
        "run_seconds": folder.read_sidecar()["seconds"],
        "trained": attached.num_parameters,
        "components": components(attached),
        **exported(folder.adapter),
    }


def _steps(events: list[dict[str, Any]]) -> Values:
    """Training losses, and the median seconds per step."""
    steps = [event for event in events if "loss" in event]
    tokens = [0, *(event["tokens"] for event in steps)]
    seconds = [
        (after - before) / event["tokens_per_second"]
        for before, after, event in zip(tokens, tokens[1:], steps, strict=False)
    ]
    return {
        "losses": [event["loss"] for event in steps],
        "step_seconds": statistics.median(seconds),
    }


def components(attached: AttachedAdapter) -> int | None:
    """Total rank of the exported adapter over all layers; None if a layer has no pair."""
    pairs = [layer.factors() for layer in attached.layers.values()]
    if any(pair is None for pair in pairs):
        return None
    return sum(pair.rank for pair in pairs if pair)


def exported(adapter: Path) -> Values:
    """Name and bytes of the PEFT file, or of `native.safetensors` if there is no PEFT file."""
    peft = adapter / WEIGHTS
    file = peft if peft.is_file() else adapter / NATIVE
    return {"exported": file.name, "exported_bytes": file.stat().st_size}
