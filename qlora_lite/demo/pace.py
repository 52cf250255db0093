"""How many steps the real model is trained: as many as fit into the time, by a measured step."""

from pathlib import Path

from qlora_lite.demo.lessons import Lesson
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics

TRAINING_SECONDS = {"bf16": 110.0, "fp16": 110.0, "fp32": 300.0}
"""Time for the steps, by compute dtype: about half of the demo, which takes at most 4 minutes on 2
idle cores with bf16 units, and 8 without."""
FEWEST_STEPS, MOST_STEPS = 12, 48
MEASURED_ROWS = 64


def measure_step(lesson: Lesson, scratch: Path) -> tuple[float, str]:
    """Seconds of a training step on this machine, and the compute dtype.

    A run of one step. It tries the largest micro-batch before, so that caches and the allocator
    are filled when the step starts.
    """
    recipe = lesson.recipe(scratch, steps=1).but(
        f"data.max_rows={MEASURED_ROWS}",
        "data.heldout=null",
        "data.heldout_share=0",
        "evaluation.samples=0",
    )
    run_recipe(recipe)
    folder = RunFolder(Path(recipe.output))
    (seconds,) = [event["seconds"] for event in metrics.read(folder.metrics) if "loss" in event]
    return seconds, folder.read_sidecar()["base"]["compute"]


def affordable_steps(step_seconds: float, compute: str) -> int:
    """The number of steps for the time, between `FEWEST_STEPS` and `MOST_STEPS`."""
    wanted = int(TRAINING_SECONDS[compute] / step_seconds)
    return max(FEWEST_STEPS, min(MOST_STEPS, wanted))
