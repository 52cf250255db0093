"""The results of `Method.split`: computed once, and reused from the saved state."""

import pytest
import torch

from qlora_lite.adapters.plan import AdapterPlan
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.adapters.split_state import SplitState, by_layer, require_fit, require_original
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.targets import LinearSpec

SPEC = LinearSpec("blocks.0.linear", 5, 3, 0, 1, "other")


def plan_of(*specs):
    return AdapterPlan(specs, {spec.path: LayerPlan(rank=2, scale=1.0) for spec in specs})


PLAN = plan_of(SPEC)


class Halving:
    """A method that splits a weight in two halves, and counts how often it computes one."""

    def __init__(self):
        self.requires = method_for(LoftQ()).requires
        self.num_computed = 0

    def split(self, spec, plan, dense, round_trip, generator, saved=None):
        if saved is not None:
            return dense - saved["half"], None
        self.num_computed += 1
        noise = torch.rand(1, generator=generator)
        return dense / 2, {"half": dense / 2, "noise": noise}


def test_tensors_belong_to_the_longest_matching_path():
    state = {"a.b.c": torch.zeros(1), "a.b.c.d": torch.ones(1), "a.e": torch.ones(1), "x.y": 0}
    found = by_layer(state, ["a", "a.b"])
    assert {path: set(tensors) for path, tensors in found.items()} == {
        "a.b": {"c", "c.d"},
        "a": {"e"},
    }


def test_a_split_is_computed_once_and_replayed_from_the_saved_state():
    dense, method = torch.arange(15.0).view(3, 5), Halving()
    first = SplitState(method, PLAN, seed=1)
    remainder = first.split(SPEC.path)(dense, None)
    start = first.build_state(SPEC.path)
    assert torch.equal(start["half"], dense / 2)
    assert start is first.start_of(SPEC.path)
    saved = {f"{SPEC.path}.start/{name}": tensor for name, tensor in start.items()}
    saved[f"{SPEC.path}.a"] = torch.ones(2)
    again = SplitState(method, PLAN, seed=99, saved=saved)
    assert torch.equal(again.split(SPEC.path)(dense, None), remainder)
    assert method.num_computed == 1
    state = again.build_state(SPEC.path)
    assert set(state) == {"start/half", "start/noise", "half", "noise", "a"}
    assert torch.equal(state["noise"], start["noise"])
    assert set(again.start_of(SPEC.path)) == {"half", "noise"}


def test_random_numbers_of_a_split_depend_on_the_seed_and_the_path():
    other = LinearSpec("blocks.1.linear", 5, 3, 1, 2, "other")

    def noise(seed, spec):
        state = SplitState(Halving(), plan_of(SPEC, other), seed)
        state.split(spec.path)(torch.zeros(3, 5), None)
        return state.start_of(spec.path)["noise"].item()

    assert noise(1, SPEC) == noise(1, SPEC)
    assert len({noise(1, SPEC), noise(2, SPEC), noise(1, other)}) == 3


def test_only_adapted_layers_of_methods_that_need_it_are_split():
    assert SplitState(Halving(), PLAN, 0).split("lm_head") is None
    assert SplitState(method_for(LoRA()), PLAN, 0).split(SPEC.path) is None


def test_a_pair_of_another_shape_is_refused():
    require_fit(SPEC, torch.zeros(2, 5), torch.zeros(3, 2))
    with pytest.raises(AdapterError, match=r"maps 3 to 5 features, the base 5 to 3"):
        require_fit(SPEC, torch.zeros(2, 3), torch.zeros(5, 2))


def test_a_quantised_checkpoint_has_no_original_weights():
    require_original(method_for(LoRA()), is_packed=True)
    require_original(method_for(LoftQ()), is_packed=False)
    with pytest.raises(AdapterError, match=r"adapter=loftq .*already quantised"):
        require_original(method_for(LoftQ()), is_packed=True)
