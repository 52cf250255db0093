"""What every method inherits."""

from qlora_lite.methods.dora import DoRA
from qlora_lite.methods.sora import SoRA
from tests.workbench import Bench


def test_lora_plus_rates_apply_to_gates_and_magnitudes_as_to_up_factors(tiny_llama):
    for settings in (SoRA(rank=4, lr_ratio=16), DoRA(rank=4, lr_ratio=16, dropout=0)):
        bench = Bench(tiny_llama, settings)
        factors = {
            name.rpartition(".")[2]: group.lr_factor
            for group in bench.attached.groups()
            for name in group.names
        }
        assert factors == {"a": 1.0} | dict.fromkeys(factors.keys() - {"a"}, 16.0)
