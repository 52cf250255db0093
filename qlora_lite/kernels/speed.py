"""Which arithmetic is fast on this processor, measured in tens of milliseconds.

The flags of a processor do not say it: some list bf16 and emulate it, and libraries differ. Each
question is answered once per process, so that one process has one answer.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qlora_lite.kernels.product import has_onednn, product

SIZE = 384
"""Rows and columns of the measured products: 0.3 to 3 ms each in fp32."""
FEWEST_REPEATS, MOST_REPEATS, ENOUGH_SECONDS = 3, 9, 0.05


def has_bf16_units() -> bool:
    """Whether the processor lists bf16 products, and oneDNN, which computes them, may use them.

    oneDNN obeys `ONEDNN_MAX_CPU_ISA`, so `ONEDNN_MAX_CPU_ISA=AVX2` imitates an older processor.
    """
    listed = torch.cpu.get_capabilities()
    return (
        bool(listed.get("avx512_bf16") or listed.get("amx_bf16"))
        and has_onednn()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@cache
def bf16_speedup() -> float:
    """How many times as fast as in fp32 a product and its gradient are in bf16; 0 without units."""
    if not has_bf16_units():
        return 0.0
    x, weight = _factors()
    short_x, short_weight = x.bfloat16(), weight.bfloat16()
    fp32, bf16 = _shortest(
        lambda: (x @ weight.T, x @ weight),
        lambda: (short_x @ short_weight.T, short_x @ short_weight),
    )
    return fp32 / bf16


@cache
def onednn_speedup() -> float:
    """How many times as fast as by torch an fp32 product and its gradient are by oneDNN; 0 if this
    build of torch does not have it."""
    if not has_onednn():
        return 0.0
    x, weight = _factors()
    by_torch, by_onednn = _shortest(
        lambda: (product(x, weight), product(x, weight.T)),
        lambda: (product(x, weight, "onednn"), product(x, weight.T, "onednn")),
    )
    return by_torch / by_onednn


def _factors() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, SIZE, generator=draw), torch.randn(SIZE, SIZE, generator=draw)


def _shortest(*functions: Callable[[], object]) -> list[float]:
    """The shortest time of each function in CPU seconds. They take turns, as load may change."""
    for function in functions:
        function()  # the first call compiles kernels
    found = [float("inf")] * len(functions)
    start = time.process_time()
    for repeat in range(MOST_REPEATS):
        for i, function in enumerate(functions):
            before = time.process_time()
            function()
            found[i] = min(found[i], time.process_time() - before)
        if repeat + 1 >= FEWEST_REPEATS and time.process_time() - start > ENOUGH_SECONDS:
            break
    return found
