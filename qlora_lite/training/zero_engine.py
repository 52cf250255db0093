"""Training with DeepSpeed ZeRO: the same steps, with states, gradients and the base divided among
processes or kept in host memory.

DeepSpeed sees one module, `_Root`, whose forward runs any function of the model, and one optimizer,
`FlatAdamW`. It averages gradients over processes, so losses are multiplied by their number. Its own
state is read and written by parameter with its `safe_*` functions, which are collective.

Trained parameters are fp32 and whole in every process: under stage 3 they are exempt from being
divided, so methods, checkpoints and exports read plain parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.method import ParameterGroup, StepInfo
from qlora_lite.foundation.partitioned import full_shape
from qlora_lite.foundation.processes import Processes
from qlora_lite.training.moments import as_torch
from qlora_lite.training.settings import Optim

T = TypeVar("T")

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATES = (*_MOMENTS, "step", "rests")


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on flat tensors that hold parts of
    several parameters.

    Every number has its own count of steps, so that the state of one parameter can be reset, and a
    flag `rests`: where it is 1, nothing changes in a step, as for a parameter without gradient.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def make_states(self, tensors: list[Tensor]) -> None:
        """Create the state of every tensor, so that it can be set before the first step."""
        for tensor in tensors:
            state = self.state[tensor]
            if not state:
                state |= {name: torch.zeros_like(tensor.data) for name in _STATES}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self.make_states([tensor])
                    _adamw(tensor, group, self.state[tensor])


def _adamw(tensor: Tensor, group: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """One step of AdamW on the numbers that do not rest."""
    beta1, beta2 = group["betas"]
    gradient, moves = tensor.grad.float(), state["rests"] == 0  # type: ignore[union-attr]
    mean, square, count = state["exp_avg"], state["exp_avg_sq"], state["step"]
    count.add_(moves)
    mean.copy_(torch.where(moves, mean.lerp(gradient, 1 - beta1), mean))
    square.copy_(torch.where(moves, square * beta2 + (1 - beta2) * gradient.square(), square))
    steps = count.clamp(min=1).double()
    mean_weight, square_weight = (1 - beta1**steps).float(), (1 - beta2**steps).float()
    update = (mean / mean_weight) / ((square / square_weight).sqrt() + group["eps"])
    decayed = tensor.data * (1 - group["lr"] * group["weight_decay"])
    tensor.data.copy_(torch.where(moves, decayed - group["lr"] * update, tensor.data))


class _Root(nn.Module):
    """What DeepSpeed takes for the model: its forward runs any function.

    Args:
        replaced: frozen modules that run while the adapter is turned off.
    """

    def __init__(self, model: nn.Module, replaced: Iterable[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.replaced = nn.ModuleList(replaced)

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


class ZeroEngine:
    """An `Engine` of DeepSpeed ZeRO stage 1, 2 or 3.

    Args:
        config: of DeepSpeed (`offload.zero.configuration`).
    """

    def __init__(
        self,
        model: nn.Module,
        attached: AttachedAdapter,
        optim: Optim,
        config: dict[str, Any],
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.skipped = False
        self.stage: int = config["zero_optimization"]["stage"]
        groups = attached.groups()
        self.names = [name for group in groups for name in group.names]
        self.parameters = [p for group in groups for p in group.parameters]
        self.lr_factors = [group.lr_factor for group in groups]
        self._is_resting = [False] * len(self.parameters)
        root = _Root(model, attached.frozen_modules.values())
        if self.stage == 3:
            deepspeed.zero.Init(module=root, config_dict_or_path=config)
        self.adam = FlatAdamW(_flat_groups(groups, optim.weight_decay), optim.betas, optim.eps)
        self.engine, *_ = deepspeed.initialize(model=root, optimizer=self.adam, config=config)
        self.zero = self.engine.optimizer
        if self.stage == 3:
            # those below the persistence threshold of an own configuration are marked already
            for parameter in self.parameters:
                if not parameter.ds_persist:  # type: ignore[attr-defined]
                    parameter.ds_persist = True  # type: ignore[attr-defined]
                    self.zero.persistent_parameters.append(parameter)
        self._gather()
        self._make_states()

    def forward(self, compute: Callable[[], T]) -> T:
        """Run a function that calls the model."""
        result: T = self.engine(compute)
        self._gather()
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch. Collective."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.processes.world, scale_wrt_gas=False)
        self._gather()

    def step(self, max_norm: float, step: StepInfo) -> float:
        """Clip, update the parameters, and return the gradient norm before clipping."""
        self._mark_resting()
        self.zero.clip_grad = max_norm
        for group, factor in zip(self.zero.param_groups, self.lr_factors, strict=True):
            group["lr"] = step.lr * factor
        self.engine.step()
        self._gather()
        return float(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        """Drop this step's gradients, also those of a backward without a step."""
        self.zero.zero_grad()
        if self.stage < 3:
            self.zero.micro_step_id = -1
            self.zero.averaged_gradients.clear()  # not rebound: parameters refer to it
            self.zero.all_grad_tensors.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter under the names of `AdamW.state_dict`. Collective."""
        flat: dict[str, Any] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            flat[f"{name}:master"] = self.read(parameter).cpu()
            steps = self._state(parameter, "step").max()
            if steps:
                flat[f"{name}:step"] = steps.cpu()
                for key in _MOMENTS:
                    flat[f"{name}:{key}"] = self._state(parameter, key).cpu()
        return flat

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or that of another engine. Collective."""
        state = as_torch(state)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            # without a master, the parameter itself has the value
            self.write(parameter, state.get(f"{name}:master", parameter.detach().clone()))
            for key in (*_MOMENTS, "step"):
                value = state.get(f"{name}:{key}", torch.zeros(()))
                self._set_state(parameter, key, value.expand(full_shape(parameter)))

    # -- ParameterAccess -----------------------------------------------------------------------

    def read(self, parameter: nn.Parameter) -> Tensor:
        with _as_trained(parameter):
            value: Tensor = safe_get_full_fp32_param(parameter)
        return value.detach().clone().view(full_shape(parameter))

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        value = value.to(parameter.device, torch.float32).contiguous()
        with _as_trained(parameter):
            if self.stage == 3:
                safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
            else:
                safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
        if self.stage == 3:
            # its own part has the old value until it is divided again
            parameter.partition([parameter], has_been_updated=True)  # type: ignore[attr-defined]
            self._gather()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        if not parameter.requires_grad:
            return None
        value: Tensor | None = safe_get_full_grad(parameter)
        return None if value is None else value.float().view(full_shape(parameter))

    def set_gradient(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage == 3:
            safe_set_local_grad(parameter, self._own_part(parameter, value.float()))
        else:
            safe_set_full_grad(parameter, value.float())

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor | None = None) -> None:
        for key in _MOMENTS if where is not None else (*_MOMENTS, "step"):
            value = self._state(parameter, key)
            mask = torch.ones_like(value, dtype=torch.bool) if where is None else where
            self._set_state(parameter, key, value.masked_fill(mask.to(value.device), 0))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.processes.sum(value)

    # -- DeepSpeed's state -----------------------------------------------------------------------

    def _gather(self) -> None:
        """Make the trained parameters whole again: DeepSpeed releases them in its first steps."""
        if self.stage < 3:
            return
        missing = [p for p in self.parameters if p.ds_status is not ZeroParamStatus.AVAILABLE]  # type: ignore[attr-defined]
        if missing:
            missing[0].all_gather(missing)  # type: ignore[attr-defined]

    def _make_states(self) -> None:
        if self.stage == 3:
            self.adam.make_states(self.zero.fp32_partitioned_groups_flat)
        else:
            self.adam.make_states([p for g in self.adam.param_groups for p in g["params"]])
            self.zero._lazy_init_hp_params_optimizer_state()

    def _mark_resting(self) -> None:
        """Mark the parameters that the method does not train in this step."""
        now = [not p.requires_grad for p in self.parameters]
        for parameter, rests, rested in zip(self.parameters, now, self._is_resting, strict=True):
            if rests != rested:
                self._set_state(parameter, "rests", torch.full(full_shape(parameter), float(rests)))
        self._is_resting = now

    def _state(self, parameter: nn.Parameter, key: str) -> Tensor:
        with _as_trained(parameter):
            value: Tensor = safe_get_full_optimizer_state(parameter, key)
        return value.clone().view(full_shape(parameter))

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        value = value.to(parameter.device, torch.float32).contiguous()
        with _as_trained(parameter):
            if self.stage == 3:
                part = self._own_part(parameter, value)
                safe_set_local_optimizer_state(parameter, part, key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What this process has of a whole value under stage 3; parts are padded to equal sizes."""
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = F.pad(value.flatten(), (0, size * self.processes.world - value.numel()))
        return flat.narrow(0, size * self.processes.rank, size)


@contextmanager
def _as_trained(parameter: nn.Parameter) -> Iterator[None]:
    """DeepSpeed's functions leave a parameter alone that requires no gradient."""
    was_trained = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(was_trained)


def _flat_groups(groups: list[ParameterGroup], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {
            "params": list(group.parameters),
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]
