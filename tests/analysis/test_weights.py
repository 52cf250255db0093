"""The weights of a base, compared with those of transformers."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

from qlora_lite.analysis.weights import BaseWeights, Part
from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import BaseModelError

CPU = choose("cpu")
EXACT = {"atol": 0, "rtol": 0}


def test_every_matrix_of_a_model_is_found(tiny_llama):
    weights = BaseWeights(str(tiny_llama), CPU)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert weights.shape(path) == tuple(module.weight.shape)
            assert_close(weights.read(Part(path)), module.weight.detach(), **EXACT)
            assert weights.num_bytes(Part(path)) == 4 * module.weight.numel()
    assert weights.shape("model.layers.0.self_attn") is None
    assert weights.shape("model.norm") is None


def test_a_part_is_a_share_of_the_rows(tiny_gpt2):
    weights = BaseWeights(str(tiny_gpt2), CPU)
    path = "transformer.h.0.attn.c_attn"
    whole = weights.read(Part(path))
    assert whole.shape == weights.shape(path) == (192, 64)
    parts = [weights.read(Part(path, index, 3)) for index in range(3)]
    assert_close(torch.cat(parts), whole, **EXACT)
    assert weights.num_bytes(Part(path, 0, 3)) * 3 == weights.num_bytes(Part(path))


@pytest.mark.parametrize("spelled", ["transformer.h.1.mlp.c_fc", "h.1.mlp.c_fc"])
@pytest.mark.parametrize("is_bare", [True, False])
def test_the_prefix_of_the_decoder_may_be_missing_on_either_side(
    tmp_path, tiny_gpt2, spelled, is_bare
):
    directory = tiny_gpt2
    if is_bare:
        directory = tmp_path / "bare"
        AutoModel.from_pretrained(tiny_gpt2, dtype=torch.float32).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    expected = model.transformer.h[1].mlp.c_fc.weight.detach().T
    assert_close(BaseWeights(str(directory), CPU).read(Part(spelled)), expected, **EXACT)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"config\.json"):
        BaseWeights(str(tmp_path), CPU)
