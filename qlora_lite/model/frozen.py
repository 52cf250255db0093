"""The frozen layers of a model: a linear layer with a packed weight, and an embedding.

A `FrozenLinear` has plain tensors: the packed codes as a parameter without gradient, the scales as
buffers. It dequantises to the compute dtype in forward and again in backward, into one buffer
(`Scratch`) that all layers of a model share. So streaming, checkpointing, ZeRO and fake tensors run
the same code.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora_lite.foundation.device import ProductLibrary
from qlora_lite.foundation.partitioned import whole
from qlora_lite.kernels.dequantise import dequantise
from qlora_lite.kernels.product import product
from qlora_lite.model.quant import NESTED_BLOCK_SIZE, FourBit, Int8, Quant

PIECE_WEIGHTS = 2**26
"""Most weights that are dequantised at a time: 128 MiB in bf16, 256 MiB in fp32. Larger matrices,
such as the head of a large vocabulary, are multiplied in pieces of whole rows."""


def piece_rows(d_out: int, d_in: int, block_size: int = 1) -> int:
    """Rows that are dequantised at a time: whole blocks, about `PIECE_WEIGHTS` weights at most."""
    aligned = block_size // math.gcd(d_in, block_size)
    rows = PIECE_WEIGHTS // d_in // aligned * aligned
    return min(d_out, max(rows, aligned))


class Scratch:
    """A buffer that is overwritten for each product. It grows to the largest size needed."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised (rows, columns) tensor, valid until the next call."""
        size = rows * columns
        buffer = self._buffers.pop((dtype, device), None)
        if buffer is None or buffer.numel() < size:
            del buffer
            buffer = torch.empty(size, dtype=dtype, device=device)
        self._buffers[dtype, device] = buffer
        return buffer[:size].view(rows, columns)


class Source(Protocol):
    """Where the original of a weight can be read."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is stored in."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, contiguous. May be a read-only view of a file."""


class FrozenLinear(nn.Module):
    """y = x W^T + bias with a packed W that is never trained.

    Attributes:
        weight: nf4 and fp4: uint8 (ceil(d_out * d_in / 2), 1); int8: int8 (d_out, d_in);
            otherwise the weight itself, (d_out, d_in).
        bias: (d_out,) or None.
        scales: fp32, one per block or row; under double quantisation their 8-bit codes, with
            `nested_scales` (fp32, one per 256), `nested_map` (the value of each code, one tensor
            for all layers) and `offset` (their mean).
        compute: dtype of the dequantised weight.
        products: which library multiplies.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scales: Tensor | None
    nested_scales: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        d_out: int,
        d_in: int,
        quant: Quant,
        compute: torch.dtype,
        weight: Tensor,
        scales: Mapping[str, Tensor] | None = None,
        bias: Tensor | None = None,
        source: Source | None = None,
        scratch: Scratch | None = None,
        products: ProductLibrary = "torch",
    ) -> None:
        super().__init__()
        self.d_in = d_in
        self.d_out = d_out
        self.quant = quant
        self.compute = compute
        self.products = products
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name in ("scales", "nested_scales", "nested_map", "offset"):
            self.register_buffer(name, (scales or {}).get(name))
        self.source = source
        self.scratch = scratch or Scratch()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T in the compute dtype, without bias; differentiable in x."""
        y: Tensor = _Product.apply(x.to(self.compute), self)
        return y

    def dense(self) -> Tensor:
        """A copy of W (d_out, d_in) in the compute dtype: exactly the values that forward uses."""
        out = torch.empty(self.d_out, self.d_in, dtype=self.compute, device=self.weight.device)
        with whole([self.weight]):
            self._dequantise(0, self.d_out, self._fp32_scales(), out)
        return out

    def original(self) -> Tensor | None:
        """W (d_out, d_in) as in the checkpoint; None if the checkpoint is quantised."""
        return None if self.source is None else self.source.rows(0, self.d_out)

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.weight.device

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and bias, without the map that all layers share."""
        tensors = (self.weight, self.bias, self.scales, self.nested_scales, self.offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def kind(self) -> str:
        """The `kind` argument of `dequantise`."""
        return self.quant.kind if isinstance(self.quant, FourBit | Int8) else "plain"

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, W[start:stop]) in the compute dtype; each is valid until the next.

        A weight that is stored in the compute dtype is yielded in one piece, without a copy.
        """
        weight = self.weight.data
        if self.kind == "plain" and weight.dtype == self.compute:
            yield 0, self.d_out, weight
            return
        scales = self._fp32_scales()
        rows = piece_rows(self.d_out, self.d_in, self._block_size)
        for start in range(0, self.d_out, rows):
            stop = min(start + rows, self.d_out)
            out = self.scratch.take(stop - start, self.d_in, self.compute, weight.device)
            self._dequantise(start, stop, scales, out)
            yield start, stop, out

    @property
    def _block_size(self) -> int:
        return self.quant.block_size if isinstance(self.quant, FourBit) else 1

    def _fp32_scales(self) -> Tensor | None:
        if self.nested_scales is None:
            return self.scales
        expanded = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.scales, self.nested_scales, self.nested_map, NESTED_BLOCK_SIZE, torch.float32
        )
        return expanded.add_(self.offset)

    def _dequantise(self, start: int, stop: int, scales: Tensor | None, out: Tensor) -> None:
        weight, block = self.weight.data, self._block_size
        assert weight.numel(), "the weight is divided among processes: use it inside the engine"
        if isinstance(self.quant, FourBit):
            assert scales is not None
            first, last = start * self.d_in, stop * self.d_in
            codes = weight.view(-1)[first // 2 : (last + 1) // 2]
            scales = scales[first // block : -(-last // block)]
        else:
            codes = weight[start:stop]
            scales = None if scales is None else scales[start:stop]
        dequantise(codes, scales, self.kind, block, out)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, {self.quant!r}, compute={self.compute}"


class _Product(torch.autograd.Function):
    """x W^T. Saves the layer for backward, not its bytes: streaming and ZeRO may move those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        rows = x.reshape(-1, linear.d_in)
        y: Tensor | None = None
        for start, stop, weight in linear.pieces():
            if stop - start == linear.d_out:
                y = product(rows, weight, linear.products)
                continue
            if y is None:
                y = rows.new_empty(len(rows), linear.d_out)
            product(rows, weight, linear.products, out=y[:, start:stop])
        assert y is not None
        return y.view(*x.shape[:-1], linear.d_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        linear = ctx.linear
        rows = grad.reshape(-1, linear.d_out)
        parts = (
            product(rows[:, start:stop], weight.T, linear.products)
            for start, stop, weight in linear.pieces()
        )
        total = next(parts)
        for part in parts:
            # only large weights have several pieces: sum in fp32, round once
            total = total.float().add_(part)
        return total.to(grad.dtype).view(*grad.shape[:-1], linear.d_in), None


class FrozenEmbedding(nn.Module):
    """An embedding that is never trained. Rows are looked up and cast to the compute dtype.

    Attributes:
        weight: (tokens, hidden), in the storage dtype.
        scale: factor on the rows, for architectures that have one (Gemma 3), or None.
    """

    def __init__(
        self,
        weight: Tensor,
        compute: torch.dtype,
        scale: Tensor | None = None,
        source: Source | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.compute = compute
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale: Tensor | None
        self.register_buffer("scale", scale, persistent=False)
        self.source = source

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., hidden)"""
        return self.scaled(self.rows(ids))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table in the compute dtype, (...) -> (..., hidden)."""
        return F.embedding(ids, self.weight).to(self.compute)

    def scaled(self, rows: Tensor) -> Tensor:
        """The looked-up rows times `scale`, if the architecture has one."""
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)

    def dense(self) -> Tensor:
        """A copy of the table (tokens, hidden) in the compute dtype, without `scale`."""
        with whole([self.weight]):
            return self.weight.detach().to(self.compute, copy=True)

    def original(self) -> Tensor | None:
        """The table as in the checkpoint."""
        return None if self.source is None else self.source.rows(0, self.num_embeddings)

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight.dtype}"
