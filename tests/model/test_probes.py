"""A loaded model is asked whether it behaves as training assumes."""

import pytest
import torch

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.head import Head
from qlora_lite.model.probes import NEXT, UNPACKED, probe
from tests.families import VOCABULARY, tiny_of

QUICK = {"llama": True, "gpt2": True, "gemma2": True, "opt": False, "bloom": False, "mamba": False}
"""Whether packed rows of a family are separate."""

SEPARATE = (
    *("qwen2", "qwen3", "mistral", "gemma3_text", "granite", "cohere", "phi3", "glm4", "olmo2"),
    *("mixtral", "stablelm", "gpt_neox", "starcoder2", "smollm3", "qwen3_moe", "olmoe"),
    *("ministral3", "glm4_moe", "cohere2", "nemotron"),
)


def packs(model) -> bool:
    return probe(CausalModel(model), VOCABULARY, "this model").packs


@pytest.mark.parametrize(("family", "expected"), QUICK.items())
def test_packing_is_found_out_and_agrees_with_what_a_plan_knows(family, expected):
    assert packs(tiny_of(family)) is expected
    assert (family not in UNPACKED) is expected


@pytest.mark.slow
@pytest.mark.parametrize("family", [*SEPARATE, *sorted(UNPACKED - QUICK.keys())])
def test_the_table_of_a_plan_is_right_for_each_family(family):
    found = packs(tiny_of(family))
    assert found is (family in SEPARATE)
    assert (family not in UNPACKED) is found


def test_rows_that_leak_really_change_each_other():
    """What the probe finds in OPT is no rounding: the second row's outputs move visibly."""
    model = CausalModel(tiny_of("opt"))
    ids = torch.arange(13)[None]
    other = ids.clone()
    other[:, :6] += 7
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    with torch.no_grad():
        moved = model.hidden(ids, positions) - model.hidden(other, positions)
    assert moved[:, 6:].abs().max() > 0.01


def test_a_bidirectional_encoder_is_refused():
    with pytest.raises(BaseModelError, match="this model is not a causal language model"):
        packs(tiny_of("bert"))


def test_outputs_that_depend_on_padding_are_refused():
    model = tiny_of("llama")
    norm = model.model.norm

    def spread(hidden: torch.Tensor) -> torch.Tensor:
        # causal in every position, but scaled by the number of positions
        return type(norm).forward(norm, hidden) * (1 + hidden.shape[1])

    norm.forward = spread
    with pytest.raises(BaseModelError, match="padding"):
        packs(model)


def test_padding_that_changes_only_the_last_output_of_a_row_is_refused():
    model = tiny_of("llama")
    norm = model.model.norm

    def spread(hidden: torch.Tensor) -> torch.Tensor:
        output = type(norm).forward(norm, hidden)
        if output.shape[1] > NEXT:
            output[:, NEXT - 1] *= 2
        return output

    norm.forward = spread
    with pytest.raises(BaseModelError, match="padding"):
        packs(model)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("recurrent_gemma", {"logits_soft_cap": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_logits_are_those_of_the_model_or_it_is_refused(family, setting, monkeypatch):
    model = tiny_of(family, **setting)
    packs(model)
    monkeypatch.setattr(Head, "logits", lambda self, hidden: self.module(hidden))
    with pytest.raises(BaseModelError, match="logits"):
        packs(model)


def test_bf16_sums_whose_norms_give_fp32_are_judged_as_bf16():
    """On CPU norms are fp32, so the last one's output is, although all sums are in bf16."""
    model = tiny_of("llama", num_hidden_layers=12)
    model.to(torch.bfloat16)
    last, head = model.model.norm.float(), model.lm_head
    head.register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
    rounding = torch.tensor([1.0, 1.005])

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        # what another batch size does to sums in bf16
        return type(last).forward(last, hidden.float()) * rounding[int(len(hidden) > 1)]

    last.forward = norm
    assert probe(CausalModel(model), VOCABULARY, "this model", torch.bfloat16).packs
    with pytest.raises(BaseModelError, match="padding"):
        probe(CausalModel(model), VOCABULARY, "this model", torch.float32)
