"""Which layers are quantised and adapted."""

import ast
import inspect
import textwrap
from collections import defaultdict
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_lite.model.linears import READ_DIRECTLY, linear_modules
from tests.families import ALL, tiny_config, tiny_of

HARMLESS = {
    # the fused kernels of a model in training mode; here it is in evaluation mode
    "BambaMixer": {"out_proj"},
    "FalconH1Mixer": {"out_proj"},
    "FalconMambaMixer": {"out_proj", "x_proj"},
    "GraniteMoeHybridMambaLayer": {"out_proj"},
    "Mamba2Mixer": {"out_proj"},
    "MambaMixer": {"out_proj", "x_proj"},
    "NemotronHMamba2Mixer": {"out_proj"},
    "Zamba2MambaMixer": {"out_proj"},
    # only with pretraining_tp > 1 and slow_but_exact
    "BloomAttention": {"dense"},
    "BloomMLP": {"dense_4h_to_h"},
    # of images
    "Phi4MultimodalImageEmbedding": {"img_projection_up"},
}
"""By class: layers whose weight is read only where this package does not run it."""


def test_falcons_subclass_and_conv1d_are_linear_layers_and_a_router_is_not():
    falcon = dict(linear_modules(tiny_of("falcon")))
    assert "transformer.h.0.self_attention.query_key_value" in falcon
    assert "transformer.h.0.attn.c_attn" in dict(linear_modules(tiny_of("gpt2")))
    phimoe = tiny_of("phimoe")
    assert isinstance(phimoe.model.layers[0].mlp.router, nn.Linear)
    assert "model.layers.0.mlp.router" not in dict(linear_modules(phimoe))


def test_a_layer_whose_weight_is_read_directly_is_left_alone():
    jamba = dict(linear_modules(tiny_of("jamba")))
    assert "model.layers.0.mamba.in_proj" in jamba
    assert "model.layers.0.mamba.dt_proj" not in jamba


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_the_layers_whose_weights_are_read_directly_are_known(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    head = model.get_output_embeddings()
    for module in model.modules():
        kind = type(module).__name__
        known = READ_DIRECTLY.get(kind, frozenset()) | HARMLESS.get(kind, set())
        for child in _weights_read_in(type(module)) - known:
            found = getattr(module, child, None)
            assert found is head or not isinstance(found, nn.Linear), f"{kind}.{child}"


@cache
def _weights_read_in(kind: type) -> set[str]:
    """The `x` of every `self.x.weight` and `self.x.bias` in the source of a class."""
    if kind.__module__.startswith("torch."):
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    found = defaultdict(set)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            found[ast.unparse(node.value.value), node.attr].add(node.value.attr)
    return found["self", "weight"] | found["self", "bias"]
