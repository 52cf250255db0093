"""A run of a few seconds on a tiny base, in a child process that can be killed."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import Interrupted
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.recipe import Recipe
from qlora_lite.run.training import run_recipe

_TIMES = {"seconds", "tokens_per_second", "peak_bytes"}

processes = multiprocessing.get_context("forkserver")
"""Children of a process that has the imports already, and no threads of its own."""
processes.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama"])


def write_rows(path: Path, num_rows: int = 120) -> Path:
    """Conversations about sums."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} plus {i % 7}?"},
                {"role": "assistant", "content": f"it is {i + i % 7}."},
            ]
        }
        for i in range(num_rows)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def small_recipe(base: Path, data: Path, output: Path, *changes: str) -> Recipe:
    """Twelve steps with dropout, gradient accumulation and a checkpoint every four.

    In fp32, so that tolerances and bits do not depend on the processor.
    """
    recipe = Recipe.model_validate(
        {
            "base": {"model": str(base), "compute": "fp32"},
            "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1},
            "data": {"train": str(data), "max_tokens": 128},
            "optim": {
                "lr": 5e-3,
                "tokens_per_step": 256,
                "micro_batch_tokens": 128,
                "steps": 12,
            },
            "evaluation": {"every": 6, "samples": 0},
            "checkpoints": {"every": 4},
            "output": str(output),
            "device": "cpu",
        }
    )
    return recipe.but(*changes) if changes else recipe


def recipe_in(folder: Path, name: str, *changes: str, base: str = "base") -> Recipe:
    """A small recipe whose base, rows and output are in the `folder` of the tests."""
    return small_recipe(folder / base, folder / "train.jsonl", folder / name, *changes)


class Killed(Exception):
    """An exception that a run does not catch."""


class Killer(Watcher):
    """Raises right after the checkpoint of step 4."""

    def saved(self, step: int) -> None:
        if step == 4:
            raise Killed


def run_in_child(recipe: Recipe, moment: str | None = None, extend: bool = False) -> Any:
    """Start a run in a child process, which kills itself at `moment`. Returns the process."""
    child = processes.Process(target=_child, args=(recipe.to_dict(), moment, extend))
    child.start()
    return child


def finish_in_child(recipe: Recipe, **options: Any) -> None:
    child = run_in_child(recipe, **options)
    child.join()
    assert child.exitcode == 0


def _child(values: dict[str, Any], moment: str | None, extend: bool) -> None:
    import torch

    torch.set_num_threads(1)
    if moment:
        _kill_at(moment)
    try:
        run_recipe(Recipe.model_validate(values), extend=extend, watcher=Watcher())
    except Interrupted:
        raise SystemExit(130) from None


def _kill_at(moment: str) -> None:
    """Make this process kill itself with SIGKILL at `moment`."""
    from qlora_lite.foundation import files
    from qlora_lite.run import finishing
    from qlora_lite.training import checkpoint, loop
    from qlora_lite.training.engine import TorchEngine

    if moment == "recipe.json":
        _die_in(files.os, "replace", call=1)
    elif moment == "first scoring":
        _die_in(loop, "_one_step", call=1)
    elif moment == "first steps":
        _die_in(TorchEngine, "step", call=3)
    elif moment == "step":
        _die_in(TorchEngine, "step", call=7)
    elif moment == "checkpoint":
        _die_in(checkpoint, "write_sealed", call=2)
    else:
        assert moment == "final save"
        _die_in(finishing, "save_adapter", call=1, after=True)


def _die_in(owner: Any, name: str, call: int, after: bool = False) -> None:
    """Kill this process at the given call of a function, before or after the call."""
    function = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if after:
                function(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(owner, name, deadly)


def result_of(run: Path) -> dict[str, Any]:
    """What interruptions must not change: bytes of adapter and optimizer, metrics."""
    found: dict[str, Any] = {
        str(path.relative_to(run)): path.read_bytes()
        for folder in ("adapter", "checkpoints")
        for path in sorted((run / folder).rglob("*.safetensors"))
    }
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    found["metrics"] = [{k: v for k, v in e.items() if k not in _TIMES} for e in events]
    return found
