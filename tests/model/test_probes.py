"""A loaded model is asked whether it behaves as training assumes."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.facts import facts_of
from qlora_lite.model.head import Head
from qlora_lite.model.probes import NEXT, UNPACKED, probe
from tests.families import ALL, UNBUILT, VOCABULARY, tiny_of

QUICK = {"llama": True, "gpt2": True, "gemma2": True, "opt": False, "bloom": False, "mamba": False}
"""Whether packed rows of a family are separate."""

REFUSED = {
    "cpmant": "it has a position for every row of its prompt",
    "inkling_text": "its logits are computed in another way",
    "modernbert-decoder": "its logits are computed in another way",
    "prophetnet": "its logits are computed in another way",
    "xlstm": "its logits are computed in another way",
    **dict.fromkeys(
        [
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"),
            *("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
            *("roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
        ],
        "it attends to later tokens",
    ),
}
"""Families that the probe refuses, and why."""


def packs(model) -> bool:
    return probe(CausalModel(model), VOCABULARY, "this model").packs


@pytest.mark.parametrize(("family", "expected"), QUICK.items())
def test_packing_is_found_out_and_agrees_with_what_a_plan_knows(family, expected):
    assert packs(tiny_of(family)) is expected
    assert (family not in UNPACKED) is expected


def refusal(config) -> str:
    """Why a plan refuses a config; empty if it does not."""
    try:
        facts_of(config)
    except BaseModelError as error:
        return str(error)
    return ""


def test_the_table_has_only_families_that_are_probed():
    assert set(ALL) >= UNPACKED
    assert set(ALL) >= REFUSED.keys()
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == {*ALL, *UNBUILT}


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_what_a_plan_knows_is_right_for_each_family(family):
    model = tiny_of(family)
    is_encoder = "is an encoder (" in refusal(model.config)
    if family in REFUSED:
        with pytest.raises(BaseModelError) as refused:
            packs(model)
        assert is_encoder is ("not a causal language model" in str(refused.value))
        return
    assert not is_encoder
    found = packs(model)
    assert (model.config.get_text_config().model_type not in UNPACKED) is found


def test_a_leak_is_found_in_bf16():
    model = tiny_of("opt").to(torch.bfloat16)
    assert not probe(CausalModel(model), VOCABULARY, "this model", torch.bfloat16).packs


def test_a_leak_is_found_next_to_one_channel_that_is_a_thousand_times_as_large():
    model = tiny_of("deepseek_v4")
    with torch.no_grad():
        model.model.norm.weight[5] = 1000
    model.to(torch.bfloat16)
    assert not probe(CausalModel(model), VOCABULARY, "this model", torch.bfloat16).packs


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


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("recurrent_gemma", {"logits_soft_cap": 30.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
    ],
)
def test_logits_are_those_of_the_model_or_it_is_refused(family, setting, compute, monkeypatch):
    model = tiny_of(family, **setting).to(compute)
    probe(CausalModel(model), VOCABULARY, "this model", compute)
    monkeypatch.setattr(Head, "logits", lambda self, hidden: self.module(hidden))
    with pytest.raises(BaseModelError, match="logits"):
        probe(CausalModel(model), VOCABULARY, "this model", compute)


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
