"""Decoder and head of a causal language model."""

import torch
from torch.testing import assert_close

from qlora_lite.model.causal import CausalModel
from tests.tiny import tiny_model


def test_position_ids_that_restart_separate_documents():
    model = CausalModel(tiny_model("llama"))
    first, second = torch.arange(5, 17)[None], torch.arange(30, 37)[None]
    positions = torch.cat([torch.arange(12), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model.hidden(torch.cat([first, second], dim=1), positions)
        alone = [model.hidden(ids, torch.arange(ids.shape[1])[None]) for ids in (first, second)]
    assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        joined = model.hidden(torch.cat([first, second], dim=1), torch.arange(19)[None])
    assert not torch.allclose(joined[:, 12:], alone[1], atol=1e-2)


def test_the_action_after_the_decoder_runs_with_and_without_gradients():
    model = CausalModel(tiny_model("llama"))
    ids, events = torch.arange(5, 17)[None], []
    model.after_decoder = lambda: events.append("freed")
    model.module.model.norm.register_forward_hook(lambda *_: events.append("norm"))
    for has_gradients in (True, False):
        events.clear()
        with torch.set_grad_enabled(has_gradients):
            model.hidden(ids, torch.arange(12)[None])
        assert events == ["norm", "freed"]


def test_a_head_is_trained_if_any_of_its_parameters_is():
    module = tiny_model("llama").requires_grad_(False)
    model = CausalModel(module)
    assert not model.head_is_trained
    module.lm_head.weight.requires_grad_(True)
    assert model.head_is_trained
