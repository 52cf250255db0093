"""What a card can do. Each subcommand takes at most six minutes on a fast card.

    python tools/benchmark/gpu.py zero --results docs/benchmarks/gpu_zero.json
    python tools/benchmark/gpu.py zero --shape tiny --device cpu --max-tokens 128   # no card

zero: DeepSpeed ZeRO on one card, with optimizer states and base in host memory: peak memory of the
card and of the host against the plan, and tokens per second. The base has the shape of Llama 3.1 8B
and random weights (16 GB on disk, in `--work`).
"""

import argparse
import importlib.metadata
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from load import write_random_llama
from rich.console import Console
from rich.table import Table

from qlora_lite.demo import BASE, TRAIN
from qlora_lite.foundation.units import format_bytes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.memory.plan import Plan
from qlora_lite.recipe import Recipe
from qlora_lite.run.training import run_recipe

SHAPES = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
OFFLOADS: dict[str, dict[str, str]] = {
    "none": {"kind": "none"},
    "zero2, states on the host": {"kind": "zero2", "optimizer": "cpu"},
    "zero3": {"kind": "zero3"},
    "zero3, all on the host": {"kind": "zero3", "optimizer": "cpu", "parameters": "cpu"},
}
STEPS, RANK = 6, 16
PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = arguments.add_subparsers(required=True)
    zero = commands.add_parser("zero", help="DeepSpeed ZeRO on one card")
    zero.add_argument("--results", type=Path, help="write the measurements as JSON")
    zero.add_argument("--shape", choices=SHAPES, default="8b")
    zero.add_argument("--device", default="cuda")
    zero.add_argument("--max-tokens", type=int, default=1024, help="of a row and a micro-batch")
    zero.add_argument("--work", type=Path, help="folder for the base (a temporary one)")
    zero.add_argument("--measure", type=Path, metavar="RECIPE", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(measure(Recipe.model_validate_json(options.measure.read_text()))))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = compare(Path(folder), options)
    if options.results:
        options.results.write_text(json.dumps(record(found, options), indent=2) + "\n")
    show(found)


def compare(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train with each of `OFFLOADS`, in fresh processes."""
    base = folder / "base"
    write_random_llama(base, SHAPES[options.shape], num_shards=1)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(BASE) / file, base / file)
    found = {}
    for name, offload in OFFLOADS.items():
        recipe = Recipe.model_validate(
            {
                "base": {"model": str(base)},
                "adapter": {"kind": "lora", "rank": RANK, "dtype": "fp32"},
                "data": {"train": TRAIN, "max_tokens": options.max_tokens},
                "optim": {
                    "tokens_per_step": 4 * options.max_tokens,
                    "micro_batch_tokens": options.max_tokens,
                    "steps": STEPS,
                    "warmup": 0,
                    "states": "32bit",
                },
                "evaluation": {"samples": 0},
                "offload": offload,
                "output": str(folder / name.replace(" ", "-").replace(",", "")),
                "device": options.device,
            }
        )
        written = folder / "recipe.json"
        written.write_text(recipe.model_dump_json())
        command = [sys.executable, __file__, "zero", "--measure", str(written)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


class Measurements(Watcher):
    """Planned bytes, and the speed of every step after the first."""

    def __init__(self) -> None:
        self.planned_bytes: dict[str, int] = {}
        self.rates: list[float] = []

    def planned(self, plan: Plan) -> None:
        ledger = plan.ledger
        self.planned_bytes = {"device": ledger.measured_bytes, "host": ledger.host_bytes}

    def stepped(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] > 1:
            self.rates.append(metrics["tokens_per_second"])


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train in this process."""
    watcher = Measurements()
    result = run_recipe(recipe, watcher=watcher)
    return {
        "peak_bytes": result.peak_bytes,
        "planned_bytes": watcher.planned_bytes,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens_per_second": statistics.median(watcher.rates),
    }


def record(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The content of the JSON file."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    is_card = options.device.startswith("cuda")
    return {
        "command": f"python tools/benchmark/gpu.py zero --shape {options.shape}",
        "card": torch.cuda.get_device_name() if is_card else None,
        "versions": versions | {"python": platform.python_version()},
        "settings": {
            "base": SHAPES[options.shape],
            "quant": "nf4",
            "adapter": f"lora, rank {RANK}, fp32",
            "max_tokens": options.max_tokens,
            "steps": STEPS,
        },
        "runs": found,
    }


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table("offload", "peak of the device", "planned", "peak of the host", "tokens/s")
    for name, run in found.items():
        table.add_row(
            name,
            format_bytes(run["peak_bytes"]),
            format_bytes(run["planned_bytes"]["device"]),
            format_bytes(run["host_peak_bytes"]),
            f"{run['tokens_per_second']:,.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
