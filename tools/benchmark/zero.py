"""Memory of every process under DeepSpeed ZeRO against the plan, and the speed of 2 against 1.

    python tools/benchmark/zero.py --results docs/benchmarks/zero.json

Makes a Llama of 55 M parameters with random weights and trains it for three steps, plainly and with
ZeRO 1, 2 and 3, in 1 and in 2 processes with the same threads in all: 8 runs, each in fresh
processes. After the first step every process counts the bytes of its live tensors by kind. Memory
while loading is RssAnon, the anonymous pages of the process, relative to the moment before.

Takes about 4 minutes of CPU. Seconds of CPU are those of all processes and threads, and do not
depend on what else runs. Processes on one machine share its cores, so that the speed of 2 against 1
says what dividing costs, not what a second card gives.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from load import PeakAnonymous, write_random_llama
from method_study.record import this_machine
from rich.console import Console
from rich.table import Table

from qlora_lite.demo import BASE, TRAIN
from qlora_lite.foundation.processes import end_process, joined
from qlora_lite.foundation.units import format_bytes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.memory.measure import peak_bytes, reset_peak
from qlora_lite.memory.plan import Plan
from qlora_lite.recipe import Recipe
from qlora_lite.run.training import run_recipe
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.loop import TrainingJob

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
STAGES = ("none", "zero1", "zero2", "zero3")
PROCESSES = (1, 2)
THREADS = 2
"""In all processes together."""
STEPS, TOKENS_PER_STEP, MAX_TOKENS, RANK = 3, 512, 256, 16
PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes")
CPU = torch.device("cpu")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--results", type=Path, help="write the measurements as JSON")
    arguments.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    arguments.add_argument("--processes", nargs="+", type=int, default=PROCESSES)
    arguments.add_argument("--measure", nargs=2, metavar=("RECIPE", "FOLDER"))
    options = arguments.parse_args()
    if options.measure:
        recipe, folder = map(Path, options.measure)
        measure(Recipe.model_validate_json(recipe.read_text()), folder)
    with tempfile.TemporaryDirectory() as work:
        runs = compare(Path(work), options.stages, options.processes)
    if options.results:
        options.results.write_text(json.dumps(record(runs), indent=2) + "\n")
    show(runs)


def compare(folder: Path, stages: Iterable[str], processes: Iterable[int]) -> list[dict[str, Any]]:
    """One entry per run, with a list of its processes."""
    base = write_random_base(folder / "base")
    return [in_processes(num, stage, base, folder) for stage in stages for num in processes]


def write_random_base(folder: Path) -> Path:
    """A random Llama with the tokenizer of the embedded model, which has fewer tokens."""
    write_random_llama(folder, SHAPE, num_shards=1)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(BASE) / file, folder / file)
    return folder


def recipe_of(base: Path, stage: str, output: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "base": {"model": str(base), "compute": "fp32"},
            "adapter": {"kind": "lora", "rank": RANK, "dtype": "fp32"},
            "data": {"train": TRAIN, "max_tokens": MAX_TOKENS, "max_rows": 200},
            "optim": {"tokens_per_step": TOKENS_PER_STEP, "steps": STEPS, "warmup": 0},
            "evaluation": {"samples": 0},
            "offload": {"kind": stage},
            "output": str(output),
            "device": "cpu",
        }
    )


def in_processes(num: int, stage: str, base: Path, folder: Path) -> dict[str, Any]:
    """Train in so many processes, started by torchrun."""
    output = folder / f"{stage}-{num}"
    output.mkdir()
    recipe = output / "recipe.json"
    recipe.write_text(recipe_of(base, stage, output / "run").model_dump_json())
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num}", "--rdzv_backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv_endpoint=127.0.0.1:0", __file__]
    done = subprocess.run(
        [*command, "--measure", str(recipe), str(output)],
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS // num)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found = [json.loads((output / f"{rank}.json").read_text()) for rank in range(num)]
    return {"stage": stage, "processes": num, "by_process": found}


def measure(recipe: Recipe, folder: Path) -> None:
    """Train as one of the processes and write `folder`/RANK.json. Does not return."""
    with joined() as processes:
        watcher = Measurements()
        run_recipe(recipe, watcher=watcher)
        (folder / f"{processes.rank}.json").write_text(json.dumps(watcher.found))
    end_process(0)


class Measurements(Watcher):
    """What one process needs, and what the plan says."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._memory = PeakAnonymous()
        self._tokens, self._cpu_start = 0, 0.0

    def planned(self, plan: Plan) -> None:
        terms = plan.ledger.terms
        self.found["planned"] = {
            "base": sum(
                t.num_bytes for t in terms if t.part == "parameters" or t.name.endswith(": scales")
            ),
            "trained": sum(t.num_bytes for t in terms if t.name == "adapters"),
            "states": sum(t.num_bytes for t in terms if t.part == "states"),
            "peak": plan.peak_bytes,
        }

    def prepared(self, data: Any) -> None:
        reset_peak(CPU)
        self._memory.__enter__()

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:
            self._memory.__exit__()
            self.found["loading_peak"] = self._memory.peak_bytes

    def stepped(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 1:  # it also creates what later ones reuse, and is not timed
            self.found["measured"] = live_bytes(running_job())
            self._tokens, self._cpu_start = metrics["tokens"], time.process_time()
            return
        rate = max(self.found.get("tokens_per_second", 0.0), metrics["tokens_per_second"])
        self.found["tokens_per_second"] = rate
        self.found["cpu_seconds"] = time.process_time() - self._cpu_start
        self.found["tokens"] = metrics["tokens"] - self._tokens
        self.found["measured"]["peak"] = peak_bytes(CPU)


def running_job() -> TrainingJob:
    """The run of this process; watchers do not get it."""
    return next(found for found in gc.get_objects() if isinstance(found, TrainingJob))


def live_bytes(job: TrainingJob) -> dict[str, int]:
    """Bytes of the tensors that a process has between steps, by kind."""
    model = job.model.module
    trained = list(job.attached.parameters().values())
    ours = {id(parameter) for parameter in trained}
    frozen = [p for p in model.parameters() if id(p) not in ours]
    shares = [p.ds_tensor for p in frozen if hasattr(p, "ds_tensor")]
    states, masters = optimizer_tensors(job.engine)
    parts = {
        "frozen parameters": storage_bytes([*frozen, *shares]),
        "buffers": storage_bytes(model.buffers()),
        "trained": storage_bytes(trained),
        "optimizer states": storage_bytes(states),
        "masters": storage_bytes(m for m in masters if id(m) not in ours),
    }
    base = parts["frozen parameters"] + parts["buffers"]
    return parts | {"base": base, "states": parts["optimizer states"] + parts["masters"]}


def optimizer_tensors(engine: Any) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
    """The states of a `TorchEngine` or a `ZeroEngine`, and its fp32 copies of the parameters."""
    if isinstance(engine, TorchEngine):
        by_parameter, masters = engine.optimizer.inner.state, engine.optimizer.fp32_copies
    elif engine.stage == 3:
        by_parameter, masters = engine.adam.state, engine.zero.fp32_partitioned_groups_flat
    else:
        by_parameter, masters = engine.adam.state, engine.zero.single_partition_of_fp32_groups
    return [t for state in by_parameter.values() for t in state.values()], masters


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def record(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of docs/benchmarks/zero.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": "python tools/benchmark/zero.py --results docs/benchmarks/zero.json",
        "machine": asdict(this_machine()),
        "versions": versions | {"python": platform.python_version()},
        "settings": {
            "base": SHAPE,
            "quant": "nf4",
            "adapter": f"lora, rank {RANK}, fp32",
            "tokens_per_step": TOKENS_PER_STEP,
            "max_tokens": MAX_TOKENS,
            "steps": STEPS,
            "threads": THREADS,
        },
        "runs": runs,
    }


def show(runs: list[dict[str, Any]]) -> None:
    """The most of any process, and the speed of all."""
    kinds = ("base", "trained", "states", "peak")
    heads = [f"{kind} (plan)" for kind in kinds]
    rates = ("tokens/s", "tokens per CPU second")
    table = Table("stage", "processes", *heads, "loading", *rates)
    for run in runs:
        cells = []
        for kind in kinds:
            found = max(each["measured"][kind] for each in run["by_process"])
            planned = run["by_process"][0]["planned"][kind]
            cells.append(f"{format_bytes(found)} ({found / planned:.1%})")
        loading = max(each["loading_peak"] for each in run["by_process"])
        first, num = run["by_process"][0], str(run["processes"])
        seconds = sum(each["cpu_seconds"] for each in run["by_process"])
        speeds = (f"{first['tokens_per_second']:.0f}", f"{first['tokens'] / seconds:.0f}")
        table.add_row(run["stage"], num, *cells, format_bytes(loading), *speeds)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
