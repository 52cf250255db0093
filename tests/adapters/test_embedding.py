"""LoRA on the input embedding."""

import torch
from torch.testing import assert_close

from qlora_lite.adapters.embedding import LoRAEmbedding
from qlora_lite.model.frozen import FrozenEmbedding

IDS = torch.tensor([[3, 0, 9], [9, 9, 1]])


def trained(scale=None):
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(10, 8, generator=draw)
    base = FrozenEmbedding(table, torch.float32, scale)
    layer = LoRAEmbedding.at_start(base, 3, 2.0, draw)
    assert torch.equal(layer(IDS), base(IDS))
    layer.a.data = torch.randn(3, 10, generator=draw)
    return layer


def test_the_output_is_that_of_the_merged_table():
    layer = trained()
    merged = layer.base.weight + layer.delta()
    assert_close(layer(IDS), merged[IDS])
    layer.enabled = False
    assert torch.equal(layer(IDS), layer.base.weight[IDS])


def test_a_factor_on_the_rows_applies_to_the_update_too():
    layer = trained(scale=torch.tensor(5.0))
    assert_close(layer(IDS), 5 * (layer.base.weight + layer.delta())[IDS])


def test_the_exported_pair_equals_the_delta():
    layer = trained()
    pair = layer.factors()
    assert pair.down.shape == (3, 10)
    assert_close((pair.up @ pair.down).T, layer.delta())
