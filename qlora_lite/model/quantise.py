"""Quantise one weight into a `FrozenLinear`, a chunk of rows at a time.

The quantiser is that of bitsandbytes. On CPU it is plain torch and needs 8.5 times the memory of
its input, so it gets chunks of whole blocks; the codes are the same. Double quantisation then runs
on the scales of all chunks together.

On CPU each thread quantises a different chunk. This is a fifth less work than all threads on one
tensor, because the temporary memory stays in cache, and on a busy machine threads do not wait for
the slowest one after each operation.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import bitsandbytes.functional
import torch
from torch import Tensor

from qlora_lite.foundation.device import DeviceRule
from qlora_lite.model.frozen import FrozenLinear, Scratch, Source
from qlora_lite.model.quant import BF16, NESTED_BLOCK_SIZE, FourBit, Int8, Quant
from qlora_lite.shards.checkpoint import Checkpoint

CHUNK_WEIGHTS = {"cpu": 2**18, "cuda": 2**24}
"""Weights per chunk. On CPU each thread needs about 4.5 MiB of temporary memory for one."""

MAX_WORKERS = 16
"""Limits the temporary memory on CPU to 72 MiB."""

RoundTrip = Callable[[Tensor], Tensor]
"""Quantises and dequantises a weight; returns fp32."""

Split = Callable[[Tensor, RoundTrip], Tensor]
"""(dense fp32 weight, round trip) -> the weight to quantise instead."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a checkpoint; `transposed` if it is stored as (d_in, d_out)."""

    checkpoint: Checkpoint
    name: str
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.checkpoint.info(self.name).shape
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.info(self.name).dtype

    def rows(self, start: int, stop: int) -> Tensor:
        if self.transposed:
            return self.checkpoint.columns(self.name, start, stop).T.contiguous()
        return self.checkpoint.rows(self.name, start, stop)


@dataclass(frozen=True)
class DenseWeight:
    """A weight in memory, (d_out, d_in)."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        d_out, d_in = self.tensor.shape
        return d_out, d_in

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].contiguous()


def quantise(
    source: Source | Tensor,
    quant: Quant,
    rule: DeviceRule,
    bias: Tensor | None = None,
    split: Split | None = None,
    scratch: Scratch | None = None,
) -> FrozenLinear:
    """Quantise a weight into a frozen layer on the rule's device.

    Args:
        source: the weight (d_out, d_in), stored or in memory.
        bias: (d_out,), stored in the dtype of norms.
        split: returns what to quantise instead of the weight; it gets all of it in fp32.
        scratch: the dequantisation buffer to share with the other layers of a model.
    """
    source = DenseWeight(source) if isinstance(source, Tensor) else source
    quantised = source
    if split is not None:
        dense = source.rows(0, source.shape[0]).to(rule.device, torch.float32)
        quantised = DenseWeight(split(dense, _quantise_round_trip(quant, rule)))
    weight, scales = _pack(quantised, quant, rule)
    if bias is not None:
        bias = bias.to(rule.device, rule.norms, copy=True)
    return FrozenLinear(
        *source.shape, quant, rule.compute, weight, scales, bias, source, scratch, rule.products
    )


def _quantise_round_trip(quant: Quant, rule: DeviceRule) -> RoundTrip:
    return lambda weight: quantise(weight, quant, rule).dense().float()


def _pack(source: Source, quant: Quant, rule: DeviceRule) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(quant, FourBit):
        return _pack_4bit(source, quant, rule.device)
    if isinstance(quant, Int8):
        return _pack_int8(source, rule.device)
    dtype = torch.bfloat16 if isinstance(quant, BF16) else torch.float32
    return copy_weight(source, dtype, rule.device), {}


def _pack_4bit(
    source: Source, quant: FourBit, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and scales; chunks give the same bits as the whole tensor at once."""
    d_out, d_in = source.shape
    block, num_weights = quant.block_size, d_out * d_in
    codes = torch.empty((num_weights + 1) // 2, 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-num_weights // block), dtype=torch.float32, device=device)

    def quantise(start: int, stop: int) -> None:
        chunk = source.rows(start, stop).to(device)
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            chunk, block, quant.kind, torch.uint8
        )
        first = start * d_in
        codes[first // 2 : first // 2 + len(packed)] = packed
        scales[first // block : first // block + len(absmax)] = absmax

    _for_each_chunk(quantise, source, device, block)
    if not quant.double_quant:
        return codes, {"scales": scales}
    offset = scales.mean()
    scale_codes, state = bitsandbytes.functional.quantize_blockwise(
        scales - offset, blocksize=NESTED_BLOCK_SIZE
    )
    return codes, {
        "scales": scale_codes,
        "nested_scales": state.absmax,
        "nested_map": _shared_map(device),
        "offset": offset,
    }


def _pack_int8(source: Source, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and row scales; bitsandbytes quantises the weight in fp16."""
    d_out, d_in = source.shape
    codes = torch.empty(d_out, d_in, dtype=torch.int8, device=device)
    scales = torch.empty(d_out, dtype=torch.float32, device=device)

    def quantise(start: int, stop: int) -> None:
        chunk = source.rows(start, stop).to(device, torch.float16)
        codes[start:stop], scales[start:stop], _ = bitsandbytes.functional.int8_vectorwise_quant(
            chunk
        )

    _for_each_chunk(quantise, source, device)
    return codes, {"scales": scales}


def copy_weight(source: Source, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight in another dtype, without a second full copy in memory."""
    d_out, d_in = source.shape
    weight = torch.empty(d_out, d_in, dtype=dtype, device=device)

    def copy(start: int, stop: int) -> None:
        weight[start:stop] = source.rows(start, stop)

    _for_each_chunk(copy, source, device)
    return weight


def _for_each_chunk(
    work: Callable[[int, int], None], source: Source, device: torch.device, block_size: int = 1
) -> None:
    """Call `work(start, stop)` for chunks of rows with whole blocks, on CPU in parallel threads."""
    d_out, d_in = source.shape
    aligned = block_size // math.gcd(d_in, block_size)
    rows = max(CHUNK_WEIGHTS[device.type] // d_in // aligned, 1) * aligned
    starts = range(0, d_out, rows)
    stops = [min(start + rows, d_out) for start in starts]
    num_threads = torch.get_num_threads()
    workers = min(num_threads, len(starts), MAX_WORKERS) if device.type == "cpu" else 1
    if workers == 1:
        for start, stop in zip(starts, stops, strict=True):
            work(start, stop)
        return
    torch.set_num_threads(1)  # of each worker
    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, starts, stops))
    finally:
        torch.set_num_threads(num_threads)


@functools.cache
def _shared_map(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type, one tensor per device."""
    return bitsandbytes.functional.create_dynamic_map().to(device)
