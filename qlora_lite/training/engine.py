"""Backward, step, and access to what is trained, under plain torch.

Gradients are summed over micro-batches in fp32, whatever dtype the parameters are stored in: a
bf16 sum would round small terms away. Methods read and write only through `ParameterAccess`, which
this class implements, so they run unchanged under another engine that keeps its values elsewhere.
"""

import math

import torch
from torch import Tensor, nn

from qlora_lite.adapters.method import StepInfo
from qlora_lite.training.optimizer import AdamW


class TorchEngine:
    """One process, one device. With fp16 compute the loss is scaled against underflow."""

    def __init__(self, optimizer: AdamW, compute: torch.dtype) -> None:
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler("cuda", enabled=compute is torch.float16)
        self.skipped = False
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch's share; after the last they are in true units."""
        self.scaler.scale(loss).backward()
        if last:
            self.optimizer.set_gradients(self._sums)
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizer.inner)

    def step(self, max_norm: float, step: StepInfo) -> float:
        """Clip, move the parameters, and return the gradient norm before clipping.

        With loss scaling an overflowed step moves nothing and is marked `skipped`.
        """
        norm = nn.utils.clip_grad_norm_(self.optimizer.fp32_copies, max_norm).item()
        self.skipped = self.scaler.is_enabled() and not math.isfinite(norm)
        if not self.skipped:
            self.optimizer.step(step.lr, step.generator)
        if self.scaler.is_enabled():
            self.scaler.update()
        return norm

    def zero_grad(self) -> None:
        """Forget this step's gradients."""
        self._sums.clear()
        self.optimizer.clear_gradients()

    def _collect(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        total = self._sums.get(parameter)
        self._sums[parameter] = gradient if total is None else total.add_(gradient)

    # -- Access --------------------------------------------------------------------------------

    def read(self, parameter: nn.Parameter) -> Tensor:
        return self.optimizer.kept(parameter).detach().clone()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        fp32_copy = self.optimizer.fp32_copy(parameter)
        if (
            fp32_copy.shape == parameter.shape
        ):  # under stochastic rounding there is none between steps
            fp32_copy.data.copy_(value)
        parameter.data.copy_(value)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return self.optimizer.fp32_copy(parameter).grad

    def set_gradient(self, parameter: nn.Parameter, value: Tensor) -> None:
        self.optimizer.fp32_copy(parameter).grad = value.float()

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor | None = None) -> None:
        self.optimizer.reset_optimizer_state(parameter, where)
