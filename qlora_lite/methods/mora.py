"""MoRA: one square matrix instead of a low-rank pair, for a high rank with the same parameters.

    y = W x + f_dec(M f_comp(drop(x)))          M (r_hat, r_hat),  r_hat^2 = r (d_in + d_out)

Jiang et al. 2024, arXiv:2405.12130. f_comp and f_dec have no parameters; their types are those of
the released code (kongds/MoRA):

    type              f_comp                                       f_dec
    1  sharing        sum the inputs of equal index mod r_hat      repeat all outputs
    2  sharing        sum r_hat groups of neighbours               repeat each output for its group
    6  rotation       cut x into blocks of r_hat and rotate        concatenate the outputs of all
                      block i like position i in RoPE;             blocks, and repeat them
                      M is applied to each block

Type 1 is eq. 6 of the paper, type 6 is eq. 9. Both wrap x around to fill the last block. There is
no alpha: the scale is 1, and M starts at zero. Type 6 is for small r. Its update has no low rank,
so only merged weights can be exported. Type 1 is for large r and is exported as a LoRA of rank
r_hat (32 times as many numbers as M at r = 8 on a 4096 x 4096 weight). In type 6 an output block
depends only on the input block of the same number: if a layer has more inputs than outputs, the
inputs after the first d_out are not used. The authors' learning rates are 3e-4 for type 6 at r = 8,
and 3e-5 to 7e-5 for type 1 at r = 256.

ReMoRA (`restart_every`): the finished M is frozen, a new M starts at zero with the other type and
no optimizer state, and the learning rate rises again over 50 steps. Matrices of one type add up
without loss, (M1 + M2) f_comp(x), so one sum per type is stored. Types 1 and 2 together are
exported as a LoRA of rank 2 r_hat.

Where we deviate: r_hat is rounded to nearest as in the released code (the paper rounds down; type 6
needs an even number) and is at most d_in and d_out: with a single block the released merge fails.
The finished M is added to its sum and not to the base, which would round it away if quantised. Only
the optimizer state of M is cleared. The new warm-up multiplies the schedule of the run; the
released code starts a new schedule at the current rate. In the released code type 6 has no second
type (its restart fails); here it alternates with type 1, whose sums reach across the blocks. Types
3 and 4, mixtures of 1 and 2, are not implemented.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer, Factors, Role
from qlora_lite.adapters.method import (
    AdapterSettings,
    Footprint,
    Method,
    ParameterAccess,
    StepInfo,
    read_rounded,
)
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

MoRAType = Literal[1, 2, 6]

ALTERNATE: dict[MoRAType, MoRAType] = {1: 2, 6: 1}
"""The type with which the first one alternates when M is restarted."""


class MoRA(AdapterSettings):
    """High-rank adaptation: one square matrix with the parameters of a low-rank pair."""

    kind: Literal["mora"] = "mora"

    rank: int = Field(default=8, ge=1)
    """Rank of the LoRA with as many parameters; `ranks` can change it per layer."""

    type: Literal[1, 6] = 6
    """How inputs are compressed for M: 1 shares it between inputs (large ranks), 6 rotates them
    (small ranks)."""

    restart_every: int | None = Field(default=None, ge=1)
    """Steps after which M is frozen and a new one starts with the other type (ReMoRA; 2000 in the
    paper). Default: never."""

    restart_warmup: int = Field(default=50, ge=0)
    """Warm-up steps of the learning rate after a restart."""

    alpha: float = Field(default=32.0, gt=0)
    """Only for the LoRA on the embedding (`embedding_rank`); the scale of MoRA is 1."""

    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """Only for the LoRA on the embedding."""

    lr_ratio: float = Field(default=1.0, gt=0)
    """Has no effect: M is neither an up nor a down factor."""

    @model_validator(mode="after")
    def _warmup_ends_before_restart(self) -> Self:
        if self.restart_every is not None and self.restart_warmup >= self.restart_every:
            raise ValueError(
                f"restart_warmup={self.restart_warmup} does not end before the next restart after "
                f"restart_every={self.restart_every} steps. Set restart_warmup below "
                f"{self.restart_every}"
            )
        return self


# -- compression before M and decompression after it -----------------------------------------------


def side_of_square(rank: int, d_in: int, d_out: int, kind: MoRAType) -> int:
    """r_hat, with which M has about the parameters of a LoRA of this rank. Even for type 6."""
    r_hat = min(round(math.sqrt(rank * (d_in + d_out))), d_in, d_out)
    return r_hat // 2 * 2 if kind == 6 else r_hat


def num_blocks(d_in: int, d_out: int, r_hat: int) -> int:
    """Number of blocks of type 6, without those that reach no output."""
    return math.ceil(min(d_in, d_out) / r_hat)


def wrap(x: Tensor, width: int) -> Tensor:
    """The first `width` features of x; after the last feature x starts again."""
    missing = width - x.shape[-1]
    return torch.cat([x, x[..., :missing]], -1) if missing > 0 else x[..., :width]


def unwrap(columns: Tensor, d_in: int) -> Tensor:
    """The transpose of `wrap`, (..., width) -> (..., d_in): features used twice are summed."""
    surplus = columns.shape[-1] - d_in
    if surplus <= 0:
        return F.pad(columns, (0, -surplus))
    first = columns[..., :surplus] + columns[..., d_in:]
    return torch.cat([first, columns[..., surplus:d_in]], -1)


def tile(y: Tensor, width: int) -> Tensor:
    """y repeated and truncated to `width` features."""
    return torch.cat([y] * math.ceil(width / y.shape[-1]), -1)[..., :width]


def sum_groups(x: Tensor, num: int) -> Tensor:
    """Sums of `num` groups of neighbours; the first groups have one more if sizes differ."""
    size, longer = divmod(x.shape[-1], num)
    cut = longer * (size + 1)
    first = x[..., :cut].unflatten(-1, (longer, size + 1)).sum(-1)
    return torch.cat([first, x[..., cut:].unflatten(-1, (num - longer, size)).sum(-1)], -1)


def repeat_groups(y: Tensor, width: int) -> Tensor:
    """The transpose of `sum_groups`: each feature repeated for its group, `width` in total."""
    size, longer = divmod(width, y.shape[-1])
    first = y[..., :longer].repeat_interleave(size + 1, -1)
    return torch.cat([first, y[..., longer:].repeat_interleave(size, -1)], -1)


def angles(blocks: int, r_hat: int) -> Tensor:
    """Angles of RoPE, (blocks, r_hat / 2): i 10000^(-2k / r_hat) for pair k of block i."""
    frequencies = 1 / 10000 ** (torch.arange(0, r_hat, 2, dtype=torch.float32) / r_hat)
    return torch.outer(torch.arange(blocks, dtype=torch.float32), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (k, k + r_hat / 2) of every block, (..., blocks, r_hat)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def nearest_pair(delta: Tensor, rank: int) -> Factors:
    """The pair of this rank nearest to `delta` in the Frobenius norm (truncated SVD)."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    missed, total = s[rank:].norm().item(), s.norm().item()
    return Factors(vh[:rank], u[:, :rank] * s[:rank], missed / total if missed else 0.0)


# -- layers ----------------------------------------------------------------------------------------


class MoRALayer(AdapterLayer):
    """y = W x + f_dec(M f_comp(drop(x)))"""

    roles: ClassVar[dict[str, Role]] = {"m": Role.CORE}

    cos: Tensor
    sin: Tensor

    def __init__(
        self, base: FrozenLinear, r_hat: int, kind: MoRAType, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        self.m = nn.Parameter(torch.zeros(r_hat, r_hat))
        self.kind = kind
        self.dropout = dropout
        if kind == 6:
            rotation = angles(num_blocks(base.d_in, base.d_out, r_hat), r_hat)
            self.register_buffer("cos", rotation.cos(), persistent=False)
            self.register_buffer("sin", rotation.sin(), persistent=False)

    def matrices(self) -> dict[MoRAType, list[Tensor]]:
        """The square matrices of every type in use; those of one type act as their sum."""
        return {self.kind: [self.m]}

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        parts = []
        for kind, matrices in self.matrices().items():
            z = self.compress(x, kind)
            # one product each: summing the weights in bf16 would round a small M away
            y = reduce(torch.add, [F.linear(z, m.to(x.dtype)) for m in matrices])
            parts.append(self.decompress(y, kind))
        return reduce(torch.add, parts)

    def compress(self, x: Tensor, kind: MoRAType) -> Tensor:
        """f_comp, (..., d_in) -> (..., r_hat), or (..., blocks, r_hat) for type 6."""
        r_hat = len(self.m)
        match kind:
            case 1:
                width = math.ceil(x.shape[-1] / r_hat) * r_hat
                return wrap(x, width).unflatten(-1, (-1, r_hat)).sum(-2)
            case 2:
                return sum_groups(x, r_hat)
            case 6:
                blocks = wrap(x, len(self.cos) * r_hat).unflatten(-1, (-1, r_hat))
                return rotate(blocks, self.cos.to(x.dtype), self.sin.to(x.dtype))

    def decompress(self, y: Tensor, kind: MoRAType) -> Tensor:
        """f_dec, to (..., d_out)."""
        match kind:
            case 1:
                return tile(y, self.base.d_out)
            case 2:
                return repeat_groups(y, self.base.d_out)
            case 6:
                return tile(y.flatten(-2), self.base.d_out)

    def delta(self) -> Tensor:
        sums = _sums(self.matrices())
        return reduce(torch.add, [self._dense(m, kind) for kind, m in sums.items()])

    def factors(self, rank: int | None = None) -> Factors | None:
        """Types 1 and 2 are pairs of rank r_hat each. Below that, and for type 6, it is the nearest
        pair of the given rank, with its error."""
        sums = _sums(self.matrices())
        if 6 not in sums and (rank is None or rank >= len(sums) * len(self.m)):
            one = torch.eye(len(self.m), device=self.m.device)
            down = torch.cat([self._down(m, kind) for kind, m in sums.items()])
            up = torch.cat([self.decompress(one, kind).T for kind in sums], 1)
            return Factors(down, up)
        return None if rank is None else nearest_pair(self.delta(), rank)

    def _down(self, m: Tensor, kind: MoRAType) -> Tensor:
        """M f_comp as a matrix (r_hat, d_in), for types 1 and 2."""
        d_in, r_hat = self.base.d_in, len(m)
        if kind == 2:
            return repeat_groups(m, d_in)
        return unwrap(tile(m, math.ceil(d_in / r_hat) * r_hat), d_in)

    def _dense(self, m: Tensor, kind: MoRAType) -> Tensor:
        """f_dec M f_comp as a matrix (d_out, d_in)."""
        if kind != 6:
            return self.decompress(self._down(m, kind).T, kind).T
        rotated = rotate(m[:, None].expand(-1, len(self.cos), -1), self.cos, -self.sin)
        blocks = torch.block_diag(*rotated.unbind(1))
        return tile(unwrap(blocks, self.base.d_in).T, self.base.d_out).T

    def restart(self, access: ParameterAccess) -> None:
        """Freeze M and start a new one (ReMoRA layers only)."""
        raise NotImplementedError

    def trainable_count(self) -> int:
        return len(self.m) ** 2


def _sums(matrices: Mapping[MoRAType, Sequence[Tensor]]) -> dict[MoRAType, Tensor]:
    """The sum of the matrices of each type, in fp32."""
    return {
        kind: reduce(torch.add, [m.detach().float() for m in parts])
        for kind, parts in matrices.items()
    }


class ReMoRALayer(MoRALayer):
    """MoRA with finished matrices next to the trained M. Their number decides the type of M.

    Attributes:
        sums: (2, r_hat, r_hat) in fp32, the sums of the finished matrices of the first and of the
            second type.
        finished: (number of finished matrices,), their types. Its length is known without a device
            synchronisation.
    """

    sums: Tensor
    finished: Tensor

    def __init__(
        self, base: FrozenLinear, r_hat: int, kind: MoRAType, dropout: float = 0.0
    ) -> None:
        super().__init__(base, r_hat, kind, dropout)
        self.cycle = (kind, ALTERNATE[kind])
        self.register_buffer("sums", torch.zeros(2, r_hat, r_hat))
        self.register_buffer("finished", torch.zeros(0, dtype=torch.int64))

    @property
    def turn(self) -> int:
        """Index of the current type of M in `cycle`."""
        return len(self.finished) % 2

    def matrices(self) -> dict[MoRAType, list[Tensor]]:
        kept = list(zip(self.cycle, self.sums, strict=True))[: len(self.finished)]
        found = {kind: [total] for kind, total in kept}
        found.setdefault(self.cycle[self.turn], []).append(self.m)
        return found

    def restart(self, access: ParameterAccess) -> None:
        """Add M to the sums and start a new M at zero; the layer's function stays the same."""
        finished = read_rounded(access, self.m)
        self.finish(finished)
        access.write(self.m, torch.zeros_like(finished))
        access.reset_optimizer_state(self.m)

    @torch.no_grad()
    def finish(self, m: Tensor) -> None:
        """Add `m`, the value of M, to the sums. M then has the other type and must be zeroed."""
        self.sums[self.turn] += m.float()
        kind = self.finished.new_tensor([self.cycle[self.turn]])
        self.finished = torch.cat([self.finished, kind])


# -- method ----------------------------------------------------------------------------------------


class MoRAMethod(Method[MoRALayer]):
    """MoRA layers, and with `restart_every` the restarts of all layers at once."""

    settings: MoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.num_restarts = 0

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """The rank of a plan is r_hat, the side of M; its scale is 1.

        Raises:
            AdapterError: if a layer is too narrow for type 6.
        """
        plans, kind = super().plan(specs), self.settings.type
        for spec in specs:
            if spec.path in plans:
                r_hat = side_of_square(plans[spec.path].rank, spec.d_in, spec.d_out, kind)
                if r_hat == 0:
                    raise AdapterError(
                        f"adapter.type={kind} rotates pairs of features, but {spec.path} maps "
                        f"{spec.d_in} to {spec.d_out}. Set adapter.type=1, or leave this layer "
                        f'out: adapter.ranks={{"{spec.path}": 0}}'
                    )
                plans[spec.path] = LayerPlan(r_hat, 1.0)
        return plans

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        r_hat, settings = plan.rank, self.settings
        blocks = num_blocks(spec.d_in, spec.d_out, r_hat) if settings.type == 6 else 1
        sums = 0 if settings.restart_every is None else 2 * r_hat**2
        return Footprint(blocks * r_hat, r_hat**2, statistics=sums)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> MoRALayer:
        settings = self.settings
        layer = MoRALayer if settings.restart_every is None else ReMoRALayer
        return layer(base, plan.rank, settings.type, settings.dropout)

    def lr_scale(self, step: int, total: int) -> float:
        """Warms up to 1 after every restart."""
        every, warmup = self.settings.restart_every, self.settings.restart_warmup
        if every is None or step < every:
            return 1.0
        return min(1.0, (step % every + 1) / (warmup + 1))

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        every = self.settings.restart_every
        if every is None or step.skipped:
            return
        due = (step.step + 1) // every  # a count, so that a skipped step only delays a restart
        if due > self.num_restarts:
            self.num_restarts = due
            for layer in self.layers.values():
                layer.restart(access)

    def state_dict(self) -> dict[str, Any]:
        return {"num_restarts": self.num_restarts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_restarts = state["num_restarts"]
