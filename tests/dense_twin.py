"""The dense transformers model that equals a frozen quantised one."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_lite.foundation import device
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import NF4
from qlora_lite.model.settings import Base


def base_twin(directory: Path) -> nn.Module:
    """`dense_twin` of a base in NF4, without an adapter."""
    return dense_twin(
        load_base(Base(model=str(directory), quant=NF4()), device.choose("cpu")).model
    )


def dense_twin(frozen: nn.Module) -> nn.Module:
    """transformers' own model in fp32, with the dequantised weights of the frozen layers."""
    config = copy.deepcopy(frozen.config)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {}
    for path, module in frozen.named_modules():
        if isinstance(module, FrozenLinear | FrozenEmbedding):
            dense = module.dense().float()
            is_transposed = isinstance(twin.get_submodule(path), Conv1D)
            state[f"{path}.weight"] = dense.T if is_transposed else dense
            if getattr(module, "bias", None) is not None:
                state[f"{path}.bias"] = module.bias.detach().float()
        else:
            own = module.named_parameters(recurse=False)
            state |= {f"{path}.{name}": p.detach().float() for name, p in own}
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", frozen.get_output_embeddings().dense().float())
    twin.load_state_dict({name: t.clone() for name, t in state.items()}, strict=True)
    return twin
