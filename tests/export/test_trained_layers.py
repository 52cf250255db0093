"""Layers that are rebuilt from the files of a run equal those in the trained model."""

from dataclasses import replace

import pytest
import torch

from qlora_lite.export.trained_layers import CHUNK_WEIGHTS, TrainedLayers, chunk_rows
from qlora_lite.foundation.errors import AdapterError, ExportError
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.facts import read_facts
from qlora_lite.model.quant import NF4, Int8
from qlora_lite.model.settings import Base
from tests.export.trained import stored, train_a_little
from tests.tiny import save_tiny

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("quant", [NF4(), Int8()])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rebuilt_layer_equals_the_trained_one(tmp_path, family, quant):
    trained = train_a_little(tmp_path / "base", quant, family=family)
    layers = TrainedLayers(trained.source, "trained")
    for path, expected in trained.attached.layers.items():
        layer = layers.layer(path)
        assert torch.equal(layer.base.dense(), expected.base.dense())
        assert torch.equal(layer.delta(), expected.delta())


def test_on_the_original_base_the_weight_is_that_of_the_checkpoint(tmp_path):
    trained = train_a_little(tmp_path / "base", NF4(), family="gpt2", tied=True)
    layer = TrainedLayers(trained.source, "original").layer("transformer.h.0.mlp.c_fc")
    expected = stored(tmp_path / "base")["transformer.h.0.mlp.c_fc.weight"].T
    assert torch.equal(layer.base.dense(), expected)


def test_the_pair_of_an_embedding_equals_its_delta(tmp_path):
    trained = train_a_little(tmp_path / "base", NF4(), LoRA(rank=4, alpha=8, embedding_rank=3))
    pair = TrainedLayers(trained.source, "trained").embedding_pair("model.embed_tokens")
    expected = trained.attached.embeddings["model.embed_tokens"].delta()
    torch.testing.assert_close(pair.up @ pair.down, expected)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    trained = train_a_little(tmp_path / "base")
    state = dict(trained.source.state)
    state[f"{UP}.a"] = state[f"{UP}.a"][:2]
    with pytest.raises(AdapterError, match=rf"{UP}\.a has shape \(2, 64\).*\(4, 64\)"):
        TrainedLayers(replace(trained.source, state=state), "trained").layer(UP)


def test_a_missing_or_extra_tensor_of_a_layer_is_named(tmp_path):
    trained = train_a_little(tmp_path / "base")
    missing = {name: t for name, t in trained.source.state.items() if name != f"{UP}.a"}
    extra = {**trained.source.state, f"{UP}.gate": torch.ones(4)}
    for state, name in ((missing, "a"), (extra, "gate")):
        layers = TrainedLayers(replace(trained.source, state=state), "trained")
        with pytest.raises(AdapterError, match=rf"disagree about {UP}\.{name}:"):
            layers.layer(UP)


def test_an_adapter_of_a_larger_base_is_refused(tmp_path):
    trained = train_a_little(tmp_path / "base", NF4(), LoRA(rank=4, train_norms=True))
    other = save_tiny(tmp_path / "other", hidden_size=32)
    facts = read_facts(Base(model=str(other)))
    with pytest.raises(AdapterError, match="another base model"):
        TrainedLayers(replace(trained.source, files=BaseFiles.of(other), facts=facts), "trained")


def test_an_adapter_of_a_changed_base_fits_only_that_base(tmp_path):
    source = replace(train_a_little(tmp_path / "base").source, adapter=LoftQ(rank=4))
    assert source.bases == ("trained",)
    with pytest.raises(ExportError, match=r"adapter=loftq .*changed.*Use base=trained"):
        source.require("original")


def test_chunks_have_about_chunk_weights_numbers_and_at_least_one_row():
    assert chunk_rows((4096, 1024)) == CHUNK_WEIGHTS // 1024
    assert chunk_rows((10, 4 * CHUNK_WEIGHTS)) == 1
    assert chunk_rows((7,)) >= 7
    assert chunk_rows((0, 5)) >= 1
