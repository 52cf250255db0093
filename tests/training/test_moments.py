"""A state of one optimizer, read by the other."""

import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

from qlora_lite.training.moments import as_bitsandbytes, as_torch


def fp32_state():
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(40, 30, generator=rng)
    return {
        "a:master": torch.ones(40, 30),
        "a:exp_avg": mean,
        "a:exp_avg_sq": mean.square(),
        "a:step": torch.tensor(3.0),
    }


def test_a_state_in_fp32_comes_back_from_bitsandbytes_as_it_was():
    state = fp32_state()
    theirs = as_bitsandbytes(state)
    assert theirs.keys() == {"a:master", "a:state1", "a:state2", "a:step"}
    assert theirs["a:step"] == 3
    back = as_torch(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_moments_in_8_bit_are_dequantised():
    state = fp32_state()
    theirs = {"a:step": 3}
    for number, moment, is_signed in (("1", "exp_avg", True), ("2", "exp_avg_sq", False)):
        code = create_dynamic_map(signed=is_signed)
        codes, quant = quantize_blockwise(state[f"a:{moment}"], code=code, blocksize=256)
        theirs |= {f"a:state{number}": codes, f"a:absmax{number}": quant.absmax}
        theirs[f"a:qmap{number}"] = code
    found = as_torch(theirs)
    assert found.keys() == {"a:exp_avg", "a:exp_avg_sq", "a:step"}
    for number, moment in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        exact, width = state[f"a:{moment}"], theirs[f"a:qmap{number}"].diff().max() / 2
        assert found[f"a:{moment}"].dtype == torch.float32
        # half the widest gap between two codes of the map, relative to the block's largest value
        assert (found[f"a:{moment}"] - exact).abs().max() <= width * exact.abs().max()
