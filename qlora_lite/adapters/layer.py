"""What an adapted layer computes.

    y = combine(x, W x) + bias          combine defaults to  W x + update(x)

A method from a paper subclasses `AdapterLayer` and defines `update`, and the low-rank pair
(`live_factors`) or the dense matrix (`delta`) that it equals. It uses the base through `matmul(x)`
and `dense()` only, so every method works on every precision.

Everything that changes what a layer computes is one of its trained parameters or buffers. Both are
saved with it (`state`), in checkpoints and in the adapter's files. The state of a schedule belongs
to the method (`Method.state_dict`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.frozen import FrozenLinear

START = "start/"
"""Prefix of the tensors that `Method.split` returned, in a layer's state."""


class Role(StrEnum):
    """What a parameter does in its layer. Optimizer groups are made by role."""

    DOWN = "down"
    """(rank, d_in): from the input into the low-rank space (LoRA's A)."""
    UP = "up"
    """(d_out, rank): back to the output (LoRA's B)."""
    CORE = "core"
    """A small matrix between the two."""
    GATE = "gate"
    """One number per rank component: fp32, no weight decay."""
    MAGNITUDE = "magnitude"
    """One number per output feature."""


@dataclass(frozen=True)
class Factors:
    """A folded LoRA pair: `delta == up @ down`, every scale inside `up`. fp32."""

    down: Tensor
    """(rank, d_in)"""
    up: Tensor
    """(d_out, rank)"""
    relative_error: float = 0.0
    """Frobenius norm of what the pair misses, relative to the delta; 0 where it is lossless."""
    magnitude: Tensor | None = None
    """(d_out,): the norms that the rows of W + up @ down are given afterwards (DoRA), or None."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class AdapterLayer(nn.Module):
    """A frozen linear layer with trained parameters on top. It replaces the layer in the model.

    With `enabled = False` it computes exactly what the base computes.
    """

    roles: ClassVar[dict[str, Role]] = {}
    """Every trained parameter's name and role."""

    frozen: ClassVar[tuple[str, ...]] = ()
    """Buffers stored in the dtype of the parameters; all others keep their own."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.start: Mapping[str, Tensor] = {}
        """What `Method.split` returned for this layer, on the CPU; reused whenever it is loaded."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        y = self.base.matmul(x)
        if self.enabled:
            y = self.combine(x, y)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def combine(self, x: Tensor, y_base: Tensor) -> Tensor:
        """The adapted output, before the bias."""
        return y_base + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base output, (..., d_in) -> (..., d_out)."""
        raise NotImplementedError

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        """Differentiable (down, up) in fp32 with `up @ down == delta`; None if there is none."""
        return None

    def delta(self) -> Tensor:
        """What merging adds to the dense weight, (d_out, d_in) in fp32."""
        pair = self.live_factors()
        assert pair is not None, f"{type(self).__name__} defines neither delta nor live_factors"
        down, up = pair
        return up.detach() @ down.detach()

    def merged(self, dense: Tensor) -> Tensor:
        """The dense weight (d_out, d_in) with what was trained, in fp32."""
        return dense.float() + self.delta()

    def factors(self, rank: int | None = None) -> Factors | None:
        """The folded pair for export, cut to `rank` if given; None if there is no such pair."""
        pair = self.live_factors()
        if pair is None or (rank is not None and rank < pair[0].shape[0]):
            return None
        return Factors(pair[0].detach(), pair[1].detach())

    def restart_chain(self, fresh: Mapping[str, Tensor]) -> None:
        """Called after the state of another run of the same method was loaded to start from.

        Only chains override it.

        Args:
            fresh: the state of this layer's own initialisation.
        """

    def warm_start(self, factors: Factors) -> None:
        """Start from a trained LoRA pair.

        Raises:
            AdapterError: if this method has no such start, or the pair's rank is larger.
        """
        raise AdapterError(
            f"{type(self).__name__} cannot start from a plain LoRA adapter. Leave out "
            "adapter.start, or give a run of the same method"
        )

    def trainable_count(self) -> int:
        """How many numbers are trained, by the paper's formula."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: getattr(self, name) for name in self.roles}

    def state(self) -> dict[str, Tensor]:
        """Everything but the base: parameters, buffers and `start/` tensors."""
        own = {n: t for n, t in self.state_dict().items() if not n.startswith("base.")}
        return own | {f"{START}{name}": tensor for name, tensor in self.start.items()}

    @torch.no_grad()
    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, except the `start/` tensors, which `Method.build` has used.

        A buffer may have another size, because banks grow.
        """
        for name, tensor in saved.items():
            if name.startswith(START):
                continue
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            if leaf in module._parameters:
                module.get_parameter(leaf).copy_(tensor)
            else:
                module._buffers[leaf] = tensor.to(self.base.device, copy=True)
