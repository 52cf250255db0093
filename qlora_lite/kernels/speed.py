"""Which arithmetic is fast on this processor, measured in a few milliseconds.

The flags of a processor do not say it: some list bf16 and emulate it, and libraries differ. Each
question is answered once per process, so that one process has one answer.
"""

import time
from collections.abc import Callable
from functools import cache

import torch

SIZE = 384
"""Rows and columns of the measured products: 0.3 to 3 ms each in fp32."""
MOST_REPEATS, MOST_SECONDS = 7, 0.05


def has_bf16_units() -> bool:
    """Whether the processor lists bf16 products, and oneDNN, which computes them, may use them.

    oneDNN obeys `ONEDNN_MAX_CPU_ISA`, so `ONEDNN_MAX_CPU_ISA=AVX2` imitates an older processor.
    """
    listed = torch.cpu.get_capabilities()
    return (
        bool(listed.get("avx512_bf16") or listed.get("amx_bf16"))
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@cache
def bf16_speedup() -> float:
    """How many times as fast as in fp32 a product and its gradient are in bf16; 0 without units."""
    if not has_bf16_units():
        return 0.0
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(SIZE, SIZE, generator=draw) for _ in range(2))
    short_x, short_weight = x.bfloat16(), weight.bfloat16()
    fp32, bf16 = _shortest(
        lambda: (x @ weight.T, x @ weight),
        lambda: (short_x @ short_weight.T, short_x @ short_weight),
    )
    return fp32 / bf16


def _shortest(*functions: Callable[[], object]) -> list[float]:
    """The shortest time of each function in seconds. They take turns, as load may change."""
    for function in functions:
        function()  # the first call compiles kernels
    found = [float("inf")] * len(functions)
    start = time.perf_counter()
    for _ in range(MOST_REPEATS):
        for i, function in enumerate(functions):
            before = time.perf_counter()
            function()
            found[i] = min(found[i], time.perf_counter() - before)
        if time.perf_counter() - start > MOST_SECONDS:
            break
    return found
