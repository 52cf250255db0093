"""Two implementations of `ParameterAccess` for tests of the hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_lite.training.engine import TorchEngine


class PlainAccess:
    """Access to the parameters of a layer without an optimizer.

    Attributes:
        resets: the parameters whose optimizer state was cleared, in order.
    """

    def __init__(self) -> None:
        self.resets: list[nn.Parameter] = []

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def set_gradient(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.grad = value

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor | None = None) -> None:
        self.resets.append(parameter)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return value


class ShardedEngine(TorchEngine):
    """An engine that takes the values out of the parameters while a hook runs, as ZeRO-3 does.

    Inside `sharded` every trained parameter is empty. Only this class's methods reach its value.
    """

    values: dict[nn.Parameter, Tensor] | None = None

    @contextmanager
    def sharded(self) -> Iterator[None]:
        parameters = self.optimizer.parameters
        self.values = {parameter: parameter.data for parameter in parameters}
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        try:
            yield
        finally:
            for parameter, value in self.values.items():
                parameter.data = value
            self.values = None

    @contextmanager
    def _gathered(self, parameter: nn.Parameter) -> Iterator[None]:
        if self.values is None:
            yield
            return
        parameter.data = self.values[parameter]
        try:
            yield
        finally:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def read(self, parameter: nn.Parameter) -> Tensor:
        with self._gathered(parameter):
            return super().read(parameter)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        with self._gathered(parameter):
            super().write(parameter, value)

    def set_gradient(self, parameter: nn.Parameter, value: Tensor) -> None:
        with self._gathered(parameter):
            super().set_gradient(parameter, value)

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor | None = None) -> None:
        with self._gathered(parameter):
            super().reset_optimizer_state(parameter, where)
