"""Every field of PEFT's LoraConfig is understood, or must have its default."""

import dataclasses
import json
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.adapters.peft import read_peft
from qlora_lite.adapters.peft_config import _NOT_APPLIED, FIELDS, read_peft_config
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRA
from tests.tiny import save_tiny
from tests.workbench import perturbed

RUNTIME = "runtime_config"
"""An object of PEFT, which is not saved."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    return perturbed(save_tiny(folder / "base"), LoRA(rank=4)).save(folder / "adapter")


@pytest.fixture
def changed(tmp_path, adapter):
    """A function: a copy of the adapter with other fields."""

    def change(**fields):
        config = json.loads((adapter / "adapter_config.json").read_text()) | fields
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        weights = tmp_path / "adapter_model.safetensors"
        weights.unlink(missing_ok=True)
        weights.symlink_to(adapter / "adapter_model.safetensors")
        return tmp_path

    return change


def test_the_table_has_every_field_of_the_installed_peft_with_its_default():
    defaults = {}
    for field in dataclasses.fields(peft.LoraConfig):
        made = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if made else field.default
    defaults[RUNTIME] = None
    assert defaults == FIELDS


def test_what_peft_writes_by_default_is_read(changed):
    written = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4).to_dict()
    assert read_peft(changed(**json.loads(json.dumps(written, default=list)))).layers


OTHER = {
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 1], [0, 1]],
    "trainable_token_indices": [3],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "megatron_config": {"a": 1},
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
    "use_bdlora": {"target_modules_bd_a": []},
    "use_qalora": True,
    "lora_bias": True,
    "ensure_weight_tying": True,
}


def test_every_field_that_is_not_applied_has_a_case_here():
    assert set(OTHER) == set(_NOT_APPLIED)


@pytest.mark.parametrize("field", [*OTHER, "a_field_of_a_later_peft"])
def test_a_value_that_changes_what_is_computed_is_refused(changed, field):
    with pytest.raises(AdapterError, match=rf"adapter_config\.json has {field}="):
        read_peft(changed(**{field: OTHER.get(field, 1)}))


def test_an_empty_field_of_a_later_peft_is_ignored(changed):
    assert read_peft(changed(new_kind=None, other_kind=False, new_config={})).layers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, r"has rank 4, and 8 according to adapter_config"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj of .* has rank 4, and 2"),
        ({"r": "4"}, r"r: got '4', a valid integer is needed"),
        ({"lora_alpha": float("nan")}, r"lora_alpha: got nan"),
        ({"lora_alpha": 10**400}, r"lora_alpha: got 1000"),
        ({"lora_alpha": -1}, r"lora_alpha: got -1"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\.q_proj: got 'x'"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern: got \['q_proj'\]"),
        ({"alpha_pattern": {"(": 1.0}}, r"the pattern '\(' .* cannot be used"),
        ({"alpha_pattern": {"a" * 501: 1.0}}, r"501 characters"),
        ({"init_lora_weights": "a new one"}, r"it is not known whether that changed the base"),
        ({"bias": "all"}, "bias='all'"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(changed, fields, message):
    with pytest.raises(AdapterError, match=message):
        read_peft(changed(**fields))


def test_a_pattern_that_would_match_for_hours_is_refused(changed):
    start = time.monotonic()
    with pytest.raises(AdapterError, match=r"takes more than 1 s to match"):
        read_peft(changed(alpha_pattern={r"(.|.)*(.|.)*(.|.)*(.|.)*[!?]": 8}))
    assert time.monotonic() - start < 20


def test_patterns_match_as_in_peft(changed):
    pattern = {r"layers\.1\..*q_proj": 8, "v_proj": 2.0}
    config = read_peft_config(changed(alpha_pattern=pattern))
    assert config.scale("model.layers.1.self_attn.q_proj") == 2
    assert config.scale("model.layers.0.self_attn.q_proj") == 1
    assert config.scale("model.layers.0.self_attn.v_proj") == 0.5
    assert config.scale("model.layers.0.self_attn.my_v_proj") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:, :2], "has rank 4|factors of"),
        (lambda t: t[None], r"factors of"),
        (lambda t: t.to(torch.int32), "floating-point"),
        (lambda t: t.fill_(float("nan")), "not finite"),
    ],
    ids=["shape", "dimensions", "dtype", "nan"],
)
def test_factors_of_another_shape_or_dtype_are_refused(changed, change, message):
    folder = changed()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = change(tensors[name].clone()).contiguous()
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        read_peft(folder)
