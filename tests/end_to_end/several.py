"""Train recipes in several processes, all in one launch: importing takes longer than training.

    outcomes = train_in_processes(2, recipes, folder)      # {name: error or None}

This file is also the script that the processes run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 400


def train_in_processes(
    count: int, recipes: Mapping[str, dict[str, Any]], folder: Path, seconds: int = SECONDS
) -> dict[str, str | None]:
    """Train each recipe in `count` processes. Returns their errors, None where there was none."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(recipes))
    answered.unlink(missing_ok=True)
    result = launch(count, [str(Path(__file__)), str(asked), str(answered)], seconds=seconds)
    traces = "\n".join(line for line in result.stderr.splitlines() if line.startswith("[rank"))
    assert answered.exists(), traces or result.stderr
    outcomes: dict[str, str | None] = json.loads(answered.read_text())
    assert result.returncode == 0, traces or result.stderr
    return outcomes


def launch(
    count: int, words: list[str], *, seconds: int = SECONDS, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a Python command in `count` processes with torchrun, one thread each."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--rdzv_backend=c10d"]
    return subprocess.run(
        [sys.executable, *torchrun, "--rdzv_endpoint=127.0.0.1:0", *words],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(),
        check=False,
        **more,
    )


def environment() -> dict[str, str]:
    """That of a launched process: this package, one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def _main(asked: str, answered: str) -> None:
    import torch

    from qlora_lite.foundation.errors import QloraLiteError
    from qlora_lite.foundation.processes import end_process, joined
    from qlora_lite.recipe import Recipe
    from qlora_lite.run.training import run_recipe

    torch.set_num_threads(1)
    outcomes: dict[str, str | None] = {}
    with joined() as processes:
        for name, recipe in json.loads(Path(asked).read_text()).items():
            try:
                run_recipe(Recipe.model_validate(recipe))
                outcomes[name] = None
            except QloraLiteError as error:  # raised by every process
                outcomes[name] = str(error)
        if processes.is_main:
            Path(answered).write_text(json.dumps(outcomes))
    end_process(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
