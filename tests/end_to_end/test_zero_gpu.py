"""ZeRO on a card, in one process: base and optimizer states in host memory."""

import pytest

from qlora_lite.foundation.partitioned import is_partitioned
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in
from tests.end_to_end.test_zero import LORA, assert_same

HOST = ("offload.parameters=cpu", "offload.optimizer=cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [("offload=zero2", HOST[1]), ("offload=zero3", *HOST)])
def test_host_memory_changes_no_loss(folder, changes):
    stage = changes[0].partition("=")[2]
    for name, more in ((stage, changes), (f"{stage}-none", ())):
        run_recipe(recipe_in(folder, name, *LORA, "device=cuda", "optim.states=32bit", *more))
    assert_same(folder / stage, folder / f"{stage}-none")


@pytest.mark.gpu
def test_the_base_is_in_host_memory_between_steps(folder, monkeypatch):
    from qlora_lite.training import loop

    places = []
    one_step = loop._one_step

    def recording(job, progress):
        one_step(job, progress)
        frozen = [p for p in job.model.module.parameters() if is_partitioned(p)]
        frozen = [p for p in frozen if not p.requires_grad]
        places.append({p.ds_tensor.device.type for p in frozen})
        assert not sum(p.data.numel() for p in frozen)

    monkeypatch.setattr(loop, "_one_step", recording)
    run_recipe(recipe_in(folder, "host", *LORA, "device=cuda", "offload=zero3", *HOST))
    assert places == [{"cpu"}] * 4
