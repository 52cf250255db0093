"""The layers of a run, compared with the trained model in memory."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qlora_lite.adapters.layer import Role
from qlora_lite.analysis.rank import kept_rank, svd_of_pair
from qlora_lite.export.trained_layers import MergeSource
from qlora_lite.inspection.deltas import BaseId, RunDeltas
from qlora_lite.methods.catalogue import METHODS
from qlora_lite.methods.lora import LoRA, LoRALayer, LoRAMethod
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.facts import read_facts
from qlora_lite.model.quant import NF4
from qlora_lite.model.settings import Base
from tests.properties.cases import CASES
from tests.workbench import CPU, Bench

EXACT = {"atol": 0, "rtol": 0}
FP32 = {"atol": 2e-6, "rtol": 1e-5}
"""Another order of summation."""


@pytest.fixture(params=CASES)
def bench(request, tiny_llama):
    """Every method after three steps."""
    bench = Bench(tiny_llama, CASES[request.param].model_settings)
    for _ in range(3):
        bench.step()
    return bench


def rebuilt(bench, directory):
    base = Base(model=str(directory), quant=NF4())
    state = {name: tensor.clone() for name, tensor in bench.attached.state().items()}
    settings = bench.method.settings
    source = MergeSource(
        base, read_facts(base), BaseFiles.of(directory), CPU, settings, state, bench.seed
    )
    return RunDeltas(str(directory), source, [])


def test_every_method_has_the_deltas_and_weights_of_the_trained_model(bench, tiny_llama):
    found, layers = rebuilt(bench, tiny_llama), bench.attached.layers
    assert list(found.shapes) == list(layers)
    for path, layer in layers.items():
        delta = found.read(path)
        assert_close(delta.weight, layer.base.dense(), **EXACT)
        dense = delta.dense
        if dense is None:
            svd = svd_of_pair(delta.pair.down, delta.pair.up)
            dense = (svd.left * svd.values @ svd.right.T).float()
        assert delta.shape == dense.shape == found.shapes[path]
        assert_close(dense, layer.delta().detach(), **FP32)
        assert delta.rank == bench.plan.layers[path].rank
        assert found.num_bytes(path) == 4 * dense.numel()


class Gated(LoRA):
    """A method with gates that is not in the catalogue."""


class GatedLayer(LoRALayer):
    """y = W x + s B diag(g) A x"""

    roles: ClassVar[dict[str, Role]] = LoRALayer.roles | {"g": Role.GATE}

    def __init__(self, base, a, b, scale):
        super().__init__(base, a, b, scale)
        self.g = nn.Parameter(torch.tensor([1.0, 0.0, 0.25, 0.0]))

    def live_factors(self):
        down, up = super().live_factors()
        return self.g[:, None] * down, up


class GatedMethod(LoRAMethod):
    """Builds `GatedLayer`s."""

    def build(self, base, spec, plan, start, generator):
        lora = super().build(base, spec, plan, start, generator)
        return GatedLayer(base, lora.a.data, lora.b.data, lora.scale)


def test_gates_are_found_and_closed_gates_reduce_the_rank(tiny_llama, monkeypatch):
    monkeypatch.setitem(METHODS, Gated, GatedMethod)
    bench = Bench(tiny_llama, Gated(rank=4, targets=["q_proj"]))
    for layer in bench.attached.layers.values():
        layer.b.data.normal_(generator=torch.Generator().manual_seed(0))
    found = rebuilt(bench, tiny_llama)
    for path in found.shapes:
        delta = found.read(path)
        assert delta.gates.tolist() == [1, 0, 0.25, 0]
        assert kept_rank(delta.svd().values, delta.shape) == 2


def test_bases_are_compared_by_fingerprint_or_else_by_name():
    here, moved, other = BaseId("/a", "f1"), BaseId("/b", "f1"), BaseId("/a", "f2")
    assert not here.differs_from(moved)
    assert here.differs_from(other)
    assert here.differs_from(BaseId("/b", None))
    assert not here.differs_from(BaseId("/a", None))
    assert not here.differs_from(BaseId(None, None))
