"""The catalogue knows every method, and every method's hooks reach values through the access."""

import importlib
import pkgutil

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from qlora_lite import methods
from qlora_lite.adapters.method import AdapterSettings
from qlora_lite.methods.catalogue import METHODS, Adapter, method_for
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.prilora import PRILoRA
from qlora_lite.methods.rm_lora import RMLoRA
from tests.methods.access import ShardedEngine
from tests.properties.cases import CASES, SAME_TRAINING
from tests.tiny import save_tiny
from tests.workbench import Bench


def test_every_settings_class_with_a_kind_is_in_the_catalogue():
    defined = set()
    for module in pkgutil.iter_modules(methods.__path__):
        for value in vars(importlib.import_module(f"{methods.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, AdapterSettings):
                defined.add(value)
    assert {c for c in defined if not c.model_fields["kind"].is_required()} == set(METHODS)


def test_kinds_are_distinct_and_select_the_settings_class():
    parse = TypeAdapter(Adapter).validate_python
    kinds = [settings.model_fields["kind"].default for settings in METHODS]
    assert len(set(kinds)) == len(METHODS)
    for settings, kind in zip(METHODS, kinds, strict=True):
        assert type(parse({"kind": kind})) is settings
    with pytest.raises(ValidationError, match="kind"):
        parse({"kind": "no such method"})


def test_settings_make_their_method():
    for settings, method in METHODS.items():
        made = method_for(settings())
        assert type(made) is method
        assert made.settings == settings()
    assert method_for(LoRA(rank=3)).settings.rank == 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


HOOKED = {name: c.model_settings for name, c in CASES.items() if name not in SAME_TRAINING} | {
    "prilora, frozen mask": PRILoRA(rank=4, prune_every=2, prune_until=0.5, freeze_mask=True),
    "rm_lora, strict mask": RMLoRA(rank=4, num_drawn=2, strict_mask=True),
}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_work_when_the_parameters_hold_no_values(directory, name):
    """As under ZeRO-3: `.data`, shapes and in-place writes all fail, only the access works."""
    settings = HOOKED[name]
    original = METHODS[type(settings)]

    class Sharded(original):
        def before_step(self, access, step):
            with access.sharded():
                super().before_step(access, step)

        def after_step(self, access, step):
            with access.sharded():
                super().after_step(access, step)

    how = {"total": 6, "dtype": torch.bfloat16, "weight_decay": 0.1}
    plain = Bench(directory, settings, **how)
    sharded = Bench(directory, settings, method=Sharded, engine=ShardedEngine, **how)
    assert [sharded.step() for _ in range(6)] == [plain.step() for _ in range(6)]
    found, expected = sharded.attached.state(), plain.attached.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
