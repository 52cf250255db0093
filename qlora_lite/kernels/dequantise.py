"""Dequantise a packed weight into a buffer that the caller owns, as a torch operator.

    dequantise(codes, scales, kind, block_size, out)

| kind       | codes                                  | scales                         |
|------------|----------------------------------------|--------------------------------|
| nf4, fp4   | uint8, two weights per byte, any shape | fp32, one per block, flattened |
| int8       | int8, (rows, d_in)                     | fp32, one per row              |
| plain      | floating, (rows, d_in)                 | None                           |

`out` is contiguous, (rows, d_in), in fp32, bf16 or fp16. Allocating a new output each time is six
times as slow on CPU, because of the page faults of fresh memory. The operator has a fake
implementation, so it also runs on fake tensors, which have shapes only.
"""

import ctypes
from typing import Any

import bitsandbytes.functional
import torch
from bitsandbytes.cextension import lib
from torch import Tensor

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_INT8_STEP = 7.874015718698502e-3
"""1/127, with the digits that bitsandbytes has."""

_PIECE = 2**22
"""int8 weights that are scaled at a time: 16 MiB in fp32."""


def reference(
    codes: Tensor, scales: Tensor | None, kind: str, block_size: int, out: Tensor
) -> None:
    """The definition: table lookup or conversion, scaling in fp32, one rounding to `out`."""
    if kind == "plain":
        values = codes
    elif kind == "int8":
        assert scales is not None
        values = codes.float() * scales[:, None] * _INT8_STEP
    else:
        assert scales is not None
        table = bitsandbytes.functional.get_4bit_type(kind, device=codes.device)
        nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()
        blocks = torch.arange(out.numel(), device=codes.device) // block_size
        values = table[nibbles[: out.numel()].int()] * scales[blocks]
    out.copy_(values.view(out.shape))


@torch.library.custom_op("qlora_lite::dequantise", mutates_args=("out",), device_types="cpu")
def dequantise(
    codes: Tensor, scales: Tensor | None, kind: str, block_size: int, out: Tensor
) -> None:
    """Write the dequantised weight into `out`, bitwise equal to what bitsandbytes returns."""
    if kind == "plain":
        out.copy_(codes)
    elif kind == "int8":
        _int8(codes, scales, out)
    elif _has_kernel(kind, block_size, out):
        _call_library(codes, scales, kind, block_size, out)
    else:
        reference(codes, scales, kind, block_size, out)


@dequantise.register_kernel("cuda")
def _(codes: Tensor, scales: Tensor | None, kind: str, block_size: int, out: Tensor) -> None:
    if kind == "plain":
        out.copy_(codes)
    elif kind == "int8":
        _int8(codes, scales, out)
    else:
        operator = torch.ops.bitsandbytes.dequantize_4bit.out
        operator(codes, scales, block_size, kind, list(out.shape), out.dtype, out=out)


@dequantise.register_fake
def _(codes: Tensor, scales: Tensor | None, kind: str, block_size: int, out: Tensor) -> None:
    packed = (out.numel() + 1) // 2 if kind in ("nf4", "fp4") else out.numel()
    torch._check(codes.numel() == packed, lambda: f"{codes.numel()} codes for {out.shape}, {kind}")


def _int8(codes: Tensor, scales: Tensor | None, out: Tensor) -> None:
    """codes * scale / 127 in fp32; in pieces if `out` has a narrower dtype."""
    assert scales is not None
    if out.dtype == torch.float32:
        torch.mul(codes, scales[:, None], out=out).mul_(_INT8_STEP)
        return
    rows = max(1, _PIECE // out.shape[1])
    pieces = zip(codes.split(rows), scales.split(rows), out.split(rows), strict=True)
    for code, scale, piece in pieces:
        piece.copy_((code * scale[:, None]).mul_(_INT8_STEP))


def _kernel(kind: str, dtype: torch.dtype) -> Any:
    """The CPU function of bitsandbytes. A private name: other versions may not have it."""
    native = getattr(lib, "_lib", None)
    return getattr(native, f"cdequantize_blockwise_cpu_{kind}_{_SHORT[dtype]}", None)


def _has_kernel(kind: str, block_size: int, out: Tensor) -> bool:
    # bitsandbytes does not use this kernel for odd sizes, nor from block size 2048 on, where its
    # AVX-512 version is inexact
    return out.numel() % 2 == 0 and block_size < 2048 and _kernel(kind, out.dtype) is not None


def _call_library(
    codes: Tensor, scales: Tensor | None, kind: str, block_size: int, out: Tensor
) -> None:
    # The kernel computes rows in parallel and starts a new block at each row, which is only right
    # if a row is a whole number of blocks. Otherwise pass the weight as one long row.
    d_in = out.shape[-1]
    rows, columns = (out.numel() // d_in, d_in) if d_in % block_size == 0 else (1, out.numel())
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, scales, out) if t is not None]
    sizes = [ctypes.c_longlong(n) for n in (block_size, rows, columns)]
    _kernel(kind, out.dtype)(*pointers, *sizes)
