"""Forward, backward, optimizer step, and access to the trained parameters.

`Engine` is what the loop and the methods use. `TorchEngine` implements it with plain torch, in one
process or several; `zero_engine.py` with DeepSpeed. Gradients are summed over micro-batches and
processes in fp32, whatever dtype the parameters are stored in: a bf16 sum would round small terms
away.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qlora_lite.adapters.method import ParameterAccess, StepInfo
from qlora_lite.foundation.processes import Processes
from qlora_lite.training.optimizer import AdamW

T = TypeVar("T")

_SCALER = "loss_scaler:"


class Engine(ParameterAccess, Protocol):
    """Computes gradients and takes optimizer steps. Callers do not depend on the implementation."""

    processes: Processes
    skipped: bool
    """Whether the last step was skipped, because a scaled gradient overflowed."""

    def forward(self, compute: Callable[[], T]) -> T:
        """Run a function that calls the model: ZeRO gathers partitioned weights inside it."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` is true for the last one of a step.

        The gradients of a step are summed over all processes.
        """

    def step(self, max_norm: float, step: StepInfo) -> float:
        """Clip, update the parameters, and return the gradient norm before clipping."""

    def zero_grad(self) -> None:
        """Drop this step's gradients."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, by name: tensors and numbers. Collective."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""


class TorchEngine:
    """The whole model in every process. With fp16 compute the loss is scaled against underflow."""

    def __init__(
        self, optimizer: AdamW, compute: torch.dtype, processes: Processes | None = None
    ) -> None:
        self.optimizer = optimizer
        self.processes = processes or Processes()
        self.scaler = torch.amp.GradScaler("cuda", enabled=compute is torch.float16)
        self.skipped = False
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def forward(self, compute: Callable[[], T]) -> T:
        """Run a function that calls the model."""
        return compute()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; after the last, sum them over the processes and
        unscale them."""
        self.scaler.scale(loss).backward()
        if last:
            self._sum_over_processes()
            self.optimizer.set_gradients(self._sums)
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizer.inner)

    def step(self, max_norm: float, step: StepInfo) -> float:
        """Clip, update the parameters, and return the gradient norm before clipping.

        With loss scaling, an overflowed step changes nothing and sets `skipped`.
        """
        norm = nn.utils.clip_grad_norm_(self.optimizer.fp32_copies, max_norm).item()
        self.skipped = self.scaler.is_enabled() and not math.isfinite(norm)
        if not self.skipped:
            self.optimizer.step(step.lr, step.generator)
        if self.scaler.is_enabled():
            self.scaler.update()
        return norm

    def zero_grad(self) -> None:
        """Drop this step's gradients."""
        self._sums.clear()
        self.optimizer.clear_gradients()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the loss scaler's."""
        scaler = {f"{_SCALER}{name}": value for name, value in self.scaler.state_dict().items()}
        return self.optimizer.state_dict() | scaler

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        scaler = {name for name in state if name.startswith(_SCALER)}
        self.optimizer.load_state_dict({n: v for n, v in state.items() if n not in scaler})
        self.scaler.load_state_dict({n.removeprefix(_SCALER): state[n] for n in scaler})

    def _collect(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        total = self._sums.get(parameter)
        self._sums[parameter] = gradient if total is None else total.add_(gradient)

    def _sum_over_processes(self) -> None:
        """Sum the gradients over the processes. A parameter may have one in some of them only."""
        if self.processes.world == 1:
            return
        parameters = self.optimizer.parameters
        counts = self.processes.sum(torch.tensor([int(p in self._sums) for p in parameters]))
        used = [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]
        if not used:
            return
        sums = [self._sums.get(p, torch.zeros_like(p, dtype=torch.float32)) for p in used]
        total = self.processes.sum(torch.cat([value.flatten() for value in sums]))
        parts = total.split([p.numel() for p in used])
        self._sums = {p: part.view(p.shape) for p, part in zip(used, parts, strict=True)}

    # -- ParameterAccess -----------------------------------------------------------------------

    def read(self, parameter: nn.Parameter) -> Tensor:
        return self.optimizer.persistent(parameter).detach().clone()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        copy = self.optimizer.fp32_copy(parameter)
        if (
            copy.shape == parameter.shape
        ):  # under stochastic rounding there is no copy between steps
            copy.data.copy_(value)
        parameter.data.copy_(value)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return self.optimizer.fp32_copy(parameter).grad

    def set_gradient(self, parameter: nn.Parameter, value: Tensor) -> None:
        self.optimizer.fp32_copy(parameter).grad = value.float()

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor | None = None) -> None:
        self.optimizer.reset_optimizer_state(parameter, where)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.processes.sum(value)
