"""Time and peak anonymous memory of loading a base in NF4, with qlora_lite and with transformers.

    python tools/benchmark/load.py --results load.json

Makes a Llama of about 1 GB in bf16 with random weights, in 1 and in 5 shards, and loads each in
fresh processes with `load_base` and with `from_pretrained` and a `BitsAndBytesConfig`. A process
first loads a tiny model, so that imports and first calls are not measured. Memory is RssAnon, the
anonymous pages of the process, without mapped files. (On CPU, transformers leaves weights that it
does not quantise in the mapped files, so its RssAnon is less than the bytes of its model.)
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.units import format_bytes
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from qlora_lite.model.shape import model_shape
from qlora_lite.shards.writer import ShardWriter, TensorSpec

GIGABYTE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
TINY = GIGABYTE | {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--results", type=Path, help="write the measurements as JSON")
    arguments.add_argument("--repeats", type=int, default=3, help="processes per loader")
    arguments.add_argument("--load", nargs=3, metavar=("LOADER", "WARM_UP", "MODEL"))
    options = arguments.parse_args()
    if options.load:
        loader, warm_up, model = options.load
        print(json.dumps(measure(loader, warm_up, model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), options.repeats)
    if options.results:
        options.results.write_text(json.dumps(results, indent=2))
    show(results)


def compare(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """One row per loader and number of shards: the best time, the median peak."""
    tiny = write_random_llama(folder / "tiny", TINY, num_shards=1)
    rows = []
    for num_shards in (1, 5):
        model = write_random_llama(folder / f"shards-{num_shards}", GIGABYTE, num_shards)
        runs: dict[str, list[dict[str, Any]]] = {"transformers": [], "qlora_lite": []}
        for _ in range(repeats):
            for loader, results in runs.items():
                results.append(in_fresh_process(loader, tiny, model))
        for loader, results in runs.items():
            peaks = sorted(result["peak_bytes"] for result in results)
            row = results[0] | {"loader": loader, "num_shards": num_shards}
            for key in ("seconds", "cpu_seconds"):
                row[key] = min(result[key] for result in results)
            row["peak_bytes"] = peaks[len(peaks) // 2]
            rows.append(row)
    return rows


def write_random_llama(directory: Path, config: dict[str, Any], num_shards: int) -> Path:
    """A model directory in bf16, as `save_pretrained` would write it."""
    llama = LlamaConfig(**config, dtype="bfloat16")
    llama.save_pretrained(directory)
    specs = [TensorSpec(p.name, torch.bfloat16, p.shape) for p in model_shape(llama).parameters]
    total = sum(spec.num_bytes for spec in specs)
    limit = total if num_shards == 1 else total // num_shards + max(s.num_bytes for s in specs) // 4
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(directory, specs, "random", limit) as writer:
        for spec in writer.pending:
            values = torch.randn(spec.shape, generator=generator, dtype=torch.float32)
            writer.write(spec.name, (values * 0.02).bfloat16())
    assert len(list(directory.glob("*.safetensors"))) == num_shards
    return directory


def in_fresh_process(loader: str, warm_up: Path, model: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", loader, str(warm_up), str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(loader: str, warm_up: str, model: str) -> dict[str, Any]:
    """Load `model`; bytes are relative to the process before loading."""
    load = {"qlora_lite": load_ours, "transformers": load_transformers}[loader]
    load(warm_up)
    gc.collect()
    with PeakAnonymous() as memory:
        start, start_cpu = time.perf_counter(), time.process_time()
        loaded = load(model)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    tensors = {t.data_ptr(): t for t in [*loaded.parameters(), *loaded.buffers()]}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": memory.peak_bytes,
        "model_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "largest_16bit_tensor_bytes": GIGABYTE["vocab_size"] * GIGABYTE["hidden_size"] * 2,
    }


def load_ours(model: str) -> torch.nn.Module:
    return load_base(Base(model=model), choose("cpu")).model


def load_transformers(model: str) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    return loaded


class PeakAnonymous:
    """Peak RssAnon during the block relative to its start, sampled every 2 ms."""

    def __enter__(self) -> "PeakAnonymous":
        self._start = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return self._peak - self._start

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("shards", "loader", "seconds", "CPU seconds", "peak", "peak above the model")
    for row in rows:
        above = row["peak_bytes"] - row["model_bytes"]
        table.add_row(
            str(row["num_shards"]),
            row["loader"],
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            format_bytes(row["peak_bytes"]),
            format_bytes(above),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
