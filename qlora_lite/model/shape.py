"""Every parameter's name, shape and role, from `config.json` alone.

The model is built on the meta device, where tensors have no data: a 70B model takes a fraction of a
second. The dimensions are read from its modules, so new architectures need no code here.

    shape = model_shape(read_config("Qwen/Qwen3-8B"))
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.config import unusable
from qlora_lite.model.linears import linear_modules
from qlora_lite.model.towers import remove_other_towers

Role = Literal["linear", "experts", "embedding", "head", "norm", "bias", "other"]


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the unquantised model."""

    name: str
    shape: tuple[int, ...]
    role: Role
    module: str
    """Path of the module that owns it."""
    block: int | None = None
    """Index of its decoder layer."""
    tied_to: str | None = None
    """The parameter whose storage it shares; only that one is counted."""
    transposed: bool = False
    """Stored as (d_in, d_out), as GPT-2's Conv1D does."""

    @property
    def num_weights(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def d_out(self) -> int:
        """Outputs of a linear layer or a head."""
        return self.shape[1 if self.transposed else 0]

    @property
    def d_in(self) -> int:
        """Inputs of a linear layer or a head."""
        return self.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder, and its parameters."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    """Width of the MLP: the input size of its last linear layer."""
    gated: bool
    """The MLP has a gate projection (SwiGLU and similar)."""
    qk_norm: bool
    """Queries and keys are normalised head by head."""
    layer_norm: bool
    """Norms are LayerNorms (mean and bias), not RMSNorms."""
    vocab: int
    blocks: str
    """Path of the decoder layers."""
    embedding: str
    """Path of the input embedding."""
    parameters: tuple[ParameterShape, ...]

    @cached_property
    def stored(self) -> tuple[ParameterShape, ...]:
        """The parameters without the tied duplicates."""
        return tuple(p for p in self.parameters if p.tied_to is None)

    @property
    def num_parameters(self) -> int:
        """Number of parameters as in model cards: tied weights are counted once."""
        return sum(p.num_weights for p in self.stored)

    @cached_property
    def matrices(self) -> dict[str, ParameterShape]:
        """The weights of all linear layers, including the head, by path of their module."""
        kinds = ("linear", "head")
        return {p.module: p for p in self.parameters if p.role in kinds and len(p.shape) == 2}

    @cached_property
    def linears(self) -> dict[str, ParameterShape]:
        """The weights of the linear layers inside the decoder."""
        return {path: p for path, p in self.matrices.items() if p.role == "linear"}

    @cached_property
    def experts(self) -> tuple[ParameterShape, ...]:
        """The weights of fused experts, each (experts, rows, columns)."""
        return tuple(p for p in self.stored if p.role == "experts")

    @cached_property
    def head(self) -> ParameterShape:
        return next(p for p in self.matrices.values() if p.role == "head")

    @property
    def is_tied(self) -> bool:
        """The head shares the storage of the input embedding."""
        return self.head.tied_to is not None


def model_shape(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelShape:
    """The dimensions and all parameters of the causal language model that `config` describes.

    Raises:
        BaseModelError: if transformers has no causal language model for this config.
    """
    model = build_on_meta(config, trust_remote_code)
    remove_other_towers(model)
    return shape_of(model, config)


def shape_of(model: nn.Module, config: PretrainedConfig) -> ModelShape:
    """`model_shape` of a model that is already built; its parameters may be on the meta device."""
    parameters = _parameter_shapes(model)
    text = config.get_text_config(decoder=True)
    heads = _dimension(text, "num_attention_heads")
    width = getattr(text, "intermediate_size", None)
    width = max(width) if isinstance(width, list) else width  # one per layer
    ff, gated = _mlp(parameters, text.hidden_size, width)
    norms = {type(m).__name__ for m in model.modules() if is_norm(m)}
    table = model.get_input_embeddings()  # type: ignore[operator]
    return ModelShape(
        family=config.model_type,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=_dimension(text, "num_key_value_heads", heads),
        head_dim=_dimension(text, "head_dim", text.hidden_size // heads),
        ff=ff,
        gated=gated,
        qk_norm=any(p.module.endswith("q_norm") for p in parameters),
        layer_norm="LayerNorm" in norms,
        vocab=text.vocab_size,
        blocks=decoder_blocks(model),
        embedding=next(path for path, module in model.named_modules() if module is table),
        parameters=tuple(parameters),
    )


def _dimension(config: PretrainedConfig, name: str, default: int | None = None) -> int:
    """A dimension of the attention layers; the largest, where layers differ in it.

    Raises:
        BaseModelError: if there is none, as in a model without attention.
    """
    try:
        value = getattr(config, name, None) or default
    except (RuntimeError, AttributeError, ValueError):
        value = _largest(config, name)
    if isinstance(value, int):
        return value
    raise BaseModelError(
        f"base.model={config.name_or_path or config.model_type}: the architecture "
        f"{config.model_type} is not supported yet, because it has no {name}. Use a decoder with "
        "attention, such as Llama, Qwen or GPT-2"
    )


def _largest(config: PretrainedConfig, name: str) -> int | None:
    """Of a setting that differs between layers; None if they do not have it."""
    layers = getattr(config, "per_layer_config", None)
    if not layers:
        return None
    return max(getattr(layers[i], name, 0) for i in range(config.num_hidden_layers)) or None


def build_on_meta(config: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model with all its tensors on the meta device.

    Raises:
        BaseModelError: if transformers has no causal language model for this config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        name = config.name_or_path or config.model_type
        raise BaseModelError(unusable(name, str(error))) from error


def _parameter_shapes(model: nn.Module) -> list[ParameterShape]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    blocks = decoder_blocks(model)
    linears = {path for path, _ in linear_modules(model)}
    first_name: dict[int, str] = {}
    shapes = []
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{kind}" if path else kind
            tied_to = first_name.setdefault(id(parameter), name)
            shapes.append(
                ParameterShape(
                    name=name,
                    shape=tuple(parameter.shape),
                    role="head"
                    if module is head
                    else _role(module, kind, parameter, path in linears),
                    module=path,
                    block=block_of(path, blocks),
                    tied_to=None if tied_to == name else tied_to,
                    transposed=isinstance(module, Conv1D) and parameter.dim() == 2,
                )
            )
    return shapes


def _role(module: nn.Module, kind: str, parameter: nn.Parameter, is_linear: bool) -> Role:
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if kind == "bias":
        return "bias"
    if is_linear:
        return "linear"
    if parameter.dim() == 3 and min(parameter.shape[1:]) > 1:
        return "experts"  # a matrix for each; a depthwise convolution has one input per channel
    return "other"


def is_norm(module: nn.Module) -> bool:
    """Whether this is a norm: a module without children whose parameters are all vectors."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not list(module.children()) and all(p.dim() == 1 for p in own)


def decoder_blocks(model: nn.Module) -> str:
    """Path of the decoder layers: the outermost list of modules with the most parameters."""
    lists = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = {
        path: sum(p.numel() for p in modules.parameters())
        for path, modules in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists)
    }
    assert outermost, f"{type(model).__name__} has no list of decoder layers"
    return max(outermost, key=lambda path: outermost[path])


def block_of(path: str, blocks: str) -> int | None:
    """Index of the decoder layer that a module is in; None outside of `blocks`."""
    if not path.startswith(f"{blocks}."):
        return None
    return int(path.removeprefix(f"{blocks}.").split(".")[0])


def _mlp(parameters: list[ParameterShape], hidden: int, width: int | None) -> tuple[int, bool]:
    """Width of the MLP (from its last linear layer if the config does not have it), and whether it
    is gated.

    With a gate, the layers before the last map `hidden` to twice that width, in one matrix or two.
    A mixture of experts has fused parameters, and counts as not gated.
    """
    last = max(p.block for p in parameters if p.block is not None)
    # linear layers of other classes have another role, and count here too
    roles = ("linear", "other")
    block = [p for p in parameters if p.role in roles and len(p.shape) == 2 and p.block == last]
    ff = width or max(p.d_in for p in block if p.d_out == hidden)
    up = sum(p.d_out for p in block if p.d_in == hidden and p.d_out % ff == 0)
    return ff, up >= 2 * ff
