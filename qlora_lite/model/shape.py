"""Every parameter's name, shape and role, from `config.json` alone.

The model is built on the meta device, where a tensor has a shape and no bytes: a 70B model takes
a fraction of a second. What a planner needs to know is read off the modules, so a new architecture
needs no line here.

    config = read_config("Qwen/Qwen3-8B")     # the only file that is fetched
    shape = model_shape(config)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from qlora_lite.foundation.errors import BaseModelError

Role = Literal["linear", "embedding", "head", "norm", "bias", "other"]


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
    """The parameter whose storage it shares; that one is the one to count."""
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
    """A decoder by its dimensions."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    """Width of the MLP: the inputs of its last linear layer."""
    gated: bool
    """The MLP has a gate beside its up projection (SwiGLU and relatives)."""
    qk_norm: bool
    """Queries and keys are normalised head by head."""
    layer_norm: bool
    """Norms are LayerNorms (mean and bias), not RMSNorms."""
    vocab: int
    blocks: str
    """Path of the decoder layers."""
    parameters: tuple[ParameterShape, ...]

    @cached_property
    def stored(self) -> tuple[ParameterShape, ...]:
        """The parameters with a storage of their own: tied ones once."""
        return tuple(p for p in self.parameters if p.tied_to is None)

    @property
    def num_parameters(self) -> int:
        """As model cards count: tied weights once."""
        return sum(p.num_weights for p in self.stored)

    @cached_property
    def matrices(self) -> dict[str, ParameterShape]:
        """The weights of all linear layers, the head among them, by path of their module."""
        kinds = ("linear", "head")
        return {p.module: p for p in self.parameters if p.role in kinds and len(p.shape) == 2}

    @cached_property
    def linears(self) -> dict[str, ParameterShape]:
        """Those inside the decoder."""
        return {path: p for path, p in self.matrices.items() if p.role == "linear"}

    @cached_property
    def head(self) -> ParameterShape:
        return next(p for p in self.matrices.values() if p.role == "head")

    @property
    def is_tied(self) -> bool:
        """The head is the input embedding."""
        return self.head.tied_to is not None


def read_config(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    known: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The config of a model directory or a hub id: one small file, never weights.

    Looked for in a local directory, in the hub's cache, in `known` and at last on the hub.

    Args:
        known: facts to fall back on when the file is not on this machine, as a config dictionary
            with its `model_type`.

    Raises:
        BaseModelError: if there is no such model, it cannot be reached or opened, or this
            transformers does not know its architecture.
    """
    if Path(model).is_dir():
        file = Path(model) / "config.json"
        if not file.is_file():
            raise BaseModelError(
                f"base.model={model}: this directory has no config.json. Give a directory that "
                "`save_pretrained` wrote, or a hub id such as Qwen/Qwen3-0.6B"
            )
    else:
        cached = try_to_load_from_cache(_valid_id(model), "config.json", revision=revision)
        if isinstance(cached, str):
            file = Path(cached)
        elif known is not None:
            return AutoConfig.for_model(**known)
        else:
            file = _fetch_config(model, revision)
    # code of a model's own is found by the hub id, beside the config it may not be there yet
    source = model if trust_remote_code else file.parent
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        raise BaseModelError(_unusable(model, str(error))) from error


def _valid_id(model: str) -> str:
    """A hub id, or a clear word about a path that leads nowhere."""
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise BaseModelError(
            f"base.model={model}: there is no such directory. Give the directory of a model with "
            "its config.json, or a hub id such as Qwen/Qwen3-0.6B"
        ) from error
    return model


def _fetch_config(model: str, revision: str | None) -> Path:
    """`config.json` brought from the hub into its cache."""
    if "/" not in model:
        raise BaseModelError(
            f"base.model={model}: there is no such directory here, and an id of the hub has an "
            "owner, such as openai-community/gpt2. Give one of the two"
        )
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except OSError as error:
        raise BaseModelError(unreachable(model, revision, error)) from error


def unreachable(model: str, revision: str | None, error: OSError) -> str:
    """Why the hub gave no file of a model, and what to do."""
    at = f" at revision {revision}" if revision else ""
    return f"base.model={model}{at}: {_hub_problem(model, error)}"


def hub_error(error: BaseException) -> OSError | None:
    """The hub's own error that a library wrapped in one that says less, if the hub is to blame."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, RepositoryNotFoundError | LocalEntryNotFoundError):  # or gated
            return told
        told = told.__cause__ or told.__context__
    return None


def _hub_problem(model: str, error: OSError) -> str:
    """Why the hub gave no file, and what to do. A gated model is also a model not found."""
    match error:
        case GatedRepoError():
            return (
                "its owners ask you to accept a licence first. Accept it on "
                f"https://huggingface.co/{model}, then log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return (
                "neither a directory here nor a model that the hub shows you. Check the spelling; "
                "for a private model log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            return "the hub has the model, not this revision. Leave base.revision out for main"
        case LocalEntryNotFoundError() if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
        case LocalEntryNotFoundError():
            reason = "the hub does not answer"
        case EntryNotFoundError():
            return "the hub has it without a config.json, so it is no transformers model"
        case _:
            reason = str(error).splitlines()[0]
    return (
        f"not on this machine, and {reason}. Its files are needed here (for a plan only its "
        "config.json): connect to the hub once, or give the directory of a downloaded model"
    )


def _unusable(model: str, reason: str) -> str:
    if "trust_remote_code" in reason:
        return (
            f"base.model={model} brings its own Python code, which would run on this machine. "
            "Read it first; then base.trust_remote_code=true allows it"
        )
    return (
        f"base.model={model}: transformers cannot use its config.json: {reason.splitlines()[0]} "
        "Check that it is a causal language model, and whether a newer transformers knows it"
    )


def model_shape(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelShape:
    """The dimensions and all parameters of the causal language model that `config` describes.

    Raises:
        BaseModelError: if transformers has no causal language model for this config.
    """
    model = _on_meta(config, trust_remote_code)
    parameters = _parameter_shapes(model)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "intermediate_size", None)
    ff, gated = _mlp(parameters, text.hidden_size, width)
    norms = {type(m).__name__ for m in model.modules() if is_norm(m)}
    return ModelShape(
        family=config.model_type,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        ff=ff,
        gated=gated,
        qk_norm=any(p.module.endswith("q_norm") for p in parameters),
        layer_norm="LayerNorm" in norms,
        vocab=text.vocab_size,
        blocks=decoder_blocks(model),
        parameters=tuple(parameters),
    )


def parameter_shapes(
    config: PretrainedConfig, trust_remote_code: bool = False
) -> list[ParameterShape]:
    """Every parameter of the model that `config` describes, in the model's own order.

    Raises:
        BaseModelError: if transformers has no causal language model for this config.
    """
    return _parameter_shapes(_on_meta(config, trust_remote_code))


def _on_meta(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        name = config.name_or_path or config.model_type
        raise BaseModelError(_unusable(name, str(error))) from error


def _parameter_shapes(model: nn.Module) -> list[ParameterShape]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    blocks = decoder_blocks(model)
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
                    role="head" if module is head else _role(module, kind, parameter),
                    module=path,
                    block=block_of(path, blocks),
                    tied_to=None if tied_to == name else tied_to,
                    transposed=isinstance(module, Conv1D) and parameter.dim() == 2,
                )
            )
    return shapes


def _role(module: nn.Module, kind: str, parameter: nn.Parameter) -> Role:
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if kind == "bias":
        return "bias"
    if is_linear(module):
        return "linear"
    return "other"


def is_linear(module: nn.Module) -> bool:
    """A plain linear layer. Subclasses may do something of their own in forward; they stay."""
    return type(module) in (nn.Linear, Conv1D)


def is_norm(module: nn.Module) -> bool:
    """A norm holds a vector or two of its own and no other module."""
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
    """Width of the MLP, from its last linear layer where the config does not name it, and whether
    it is gated.

    The layers before the last lead from `hidden` to that width once, or twice with a gate (as one
    matrix or two). A mixture of experts keeps them in fused parameters, and counts as not gated.
    """
    last = max(p.block for p in parameters if p.block is not None)
    # a linear layer that stays as it is (Falcon's) is not of the role, and shapes the MLP as well
    roles = ("linear", "other")
    block = [p for p in parameters if p.role in roles and len(p.shape) == 2 and p.block == last]
    ff = width or max(p.d_in for p in block if p.d_out == hidden)
    up = sum(p.d_out for p in block if p.d_in == hidden and p.d_out % ff == 0)
    return ff, up >= 2 * ff
