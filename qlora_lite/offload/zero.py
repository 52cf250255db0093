"""DeepSpeed behind a few functions: settings to its configuration, start, partitioning.

Only a run that asks for it imports `deepspeed`: here, in `training/zero_engine.py`, and in
`foundation/partitioned.py`.
"""

import importlib.util
import logging
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite.foundation.errors import DeviceError, RecipeError
from qlora_lite.foundation.files import read_object
from qlora_lite.offload.settings import ZeRO

_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
"""Batch sizes are in tokens here, and set by `optim.tokens_per_step`."""

_PASSED_ON = (
    *("aio", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("comms_logger", "flops_profiler", "memory_breakdown", "wall_clock_breakdown"),
    *("steps_per_print", "dump_state"),
)
"""Sections of a file, besides zero_optimization, that DeepSpeed gets as they are. It ignores names
that it does not know, and others would do what the recipe does."""

MAX_BUCKET_NUMBERS = 50_000_000
"""Numbers of a communication bucket. DeepSpeed allocates it whole, in fp32."""

LIVE_NUMBERS, PREFETCH_NUMBERS = 200_000_000, 50_000_000
"""Numbers of gathered weights on a card under stage 3: kept because they are used again soon, or
fetched ahead; and fetched ahead at a time. A layer of an 8B model has 109 million in 4 bit. On CPU
they are 0: fetching ahead is not faster there."""

SWAP_BUFFERS, SWAP_NUMBERS = 5, 100_000_000
"""Buffers between a disk and memory, in fp32. A share of a weight must fit into one."""


def configuration(
    offload: ZeRO,
    max_grad_norm: float,
    device: torch.device,
    num_trained: int = MAX_BUCKET_NUMBERS,
) -> dict[str, Any]:
    """The DeepSpeed configuration of the settings, with the values of `offload.config` on top.

    DeepSpeed sees one micro-batch at a time, in the dtypes that we chose: the loop accumulates
    gradients, and nothing is cast.

    Args:
        num_trained: trained numbers; only the size of the buckets depends on it.

    Raises:
        RecipeError: if a value of the file contradicts the recipe.
    """
    pin = offload.pin_memory and device.type == "cuda"
    optimizer, parameters = offload.places
    bucket = offload.bucket_size or min(num_trained, MAX_BUCKET_NUMBERS)
    bucket += bucket % 2  # DeepSpeed asserts it
    zero: dict[str, Any] = {
        "stage": offload.stage,
        "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    path = getattr(offload, "nvme_path", None)
    for name, place in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if place != "none":
            zero[name] = {"device": place, "pin_memory": pin}
            if place == "nvme":
                zero[name] |= {"nvme_path": path, "buffer_count": SWAP_BUFFERS}
                if name == "offload_param":
                    zero[name] |= {"buffer_size": SWAP_NUMBERS}
    if offload.stage == 3:
        # adapters are marked as persistent one by one; a threshold would keep small frozen ones too
        live, ahead = (0, 0) if device.type == "cpu" else (LIVE_NUMBERS, PREFETCH_NUMBERS)
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": ahead,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if offload.config is None:
        return config
    return _with_file(config, offload, Path(offload.config), max_grad_norm)


def _with_file(
    config: dict[str, Any], offload: ZeRO, path: Path, max_grad_norm: float
) -> dict[str, Any]:
    try:
        own = read_object(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"offload.config={path}: {error}. Give a DeepSpeed JSON file") from None
    section = own.pop("zero_optimization", {})
    if not isinstance(section, dict):
        raise RecipeError(f"offload.config={path}: zero_optimization is not an object")
    _refuse(path, "zero_optimization.stage", section.get("stage"), offload.stage, "offload")
    clipping = own.pop("gradient_clipping", None)
    _refuse(path, "gradient_clipping", clipping, max_grad_norm, "optim.max_grad_norm")
    for name in _OURS:
        _refuse(path, name, own.pop(name, None), None, "optim.tokens_per_step")
    for name in ("optimizer", "scheduler"):
        _refuse(path, name, own.pop(name, None), None, "optim")
    for name in ("bf16", "fp16", "amp", "torch_autocast", "data_types"):
        value = own.pop(name, None)
        is_off = isinstance(value, dict) and not value.get("enabled", False)
        _refuse(path, name, None if is_off else value, None, "base.compute")
    for name in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"):
        _refuse(path, name, own.pop(name, None), config[name], "optim")
    if unknown := sorted(own.keys() - set(_PASSED_ON)):
        raise RecipeError(
            f"offload.config={path} has {unknown[0]}, which is not passed on to DeepSpeed. "
            f"Allowed: zero_optimization, {', '.join(sorted(_PASSED_ON))}"
        )
    given = {name: value for name, value in section.items() if value != "auto"}
    return {**config, **own, "zero_optimization": config["zero_optimization"] | given}


def _refuse(path: Path, name: str, given: Any, ours: Any, setting: str) -> None:
    """Refuse a value of the file that is not what the recipe says. `auto` leaves it to us."""
    if any(given == accepted for accepted in (None, "auto", ours)):
        return
    what = f"the recipe has {ours!r}" if ours is not None else "the recipe sets that itself"
    raise RecipeError(
        f"offload.config={path} has {name}={given!r}, and {what} ({setting}). Leave {name} out of "
        f"the file, and use {setting}"
    )


def require_available(config: dict[str, Any]) -> None:
    """Check that DeepSpeed and what a configuration needs are installed.

    Raises:
        DeviceError: naming the missing package.
        RecipeError: if a folder does not exist.
    """
    zero = config["zero_optimization"]
    if importlib.util.find_spec("deepspeed") is None:
        raise DeviceError(f"offload=zero{zero['stage']} needs DeepSpeed: pip install deepspeed")
    sections = [zero.get(name) for name in ("offload_optimizer", "offload_param")]
    on_disk = [s for s in sections if isinstance(s, dict) and s.get("device") == "nvme"]
    if not on_disk:
        return
    for section in on_disk:
        path = section.get("nvme_path")
        if path is None or not Path(path).is_dir():
            raise RecipeError(
                f"offload.nvme_path={path} is not a folder. Create it on a fast disk, and set "
                "offload.nvme_path, or nvme_path in your DeepSpeed file"
            )
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        raise DeviceError(
            "offload to nvme compiles a small library, and there is no g++ or no ninja. "
            "Install them (Debian: g++ ninja-build), or use offload.parameters=cpu"
        )
    if not _has_libaio():
        raise DeviceError(
            "offload to nvme needs libaio with its header. Install it (Debian: libaio-dev), or "
            "use offload.parameters=cpu"
        )


def _has_libaio() -> bool:
    folders = [Path("/usr/include"), Path("/usr/local/include")]
    folders += [Path(p) for p in os.environ.get("CPATH", "").split(":") if p]
    return any((folder / "libaio.h").is_file() for folder in folders)


def start(device: torch.device) -> None:
    """Make DeepSpeed use the processes that we have joined, or this one alone."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _without_stderr():  # it asks the linker which libraries there are
        import deepspeed

        # its shared-memory communication is compiled at the first use, and aborts without a
        # compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # only errors: the rest describes its own start
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|deepspeed")
    if not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # torchrun with one process: its store has another port, and connecting to it would hang
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    backend = "gloo" if device.type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def require_valid(config: dict[str, Any], path: str) -> None:
    """Check the section zero_optimization with DeepSpeed's own model of it.

    Raises:
        RecipeError: naming the key and what is wrong.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise RecipeError(f"offload.config={path}: {key}: {first['msg']}") from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what this process and its children write to stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def partitioner(config: dict[str, Any]) -> Callable[[nn.Module], None]:
    """A function that divides the parameters of a module among the processes, and lets go of the
    rest. Collective."""
    import deepspeed

    def partition(module: nn.Module) -> None:
        deepspeed.zero.Init(module=module, config_dict_or_path=config)

    return partition
