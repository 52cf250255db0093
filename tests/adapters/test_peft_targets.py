"""An `adapter_config.json` that names other layers than its file has is refused."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.peft import read_peft
from qlora_lite.foundation.errors import AdapterError
from tests.tiny import save_tiny

PROJECTIONS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("targets") / "base")


def saved(base, folder, **settings):
    """An adapter that PEFT wrote, and its configuration."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": PROJECTIONS},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": PROJECTIONS, "layers_to_transform": [1]},
        {"target_modules": PROJECTIONS, "layers_to_transform": 0},
        {"target_modules": PROJECTIONS, "exclude_modules": r".*\.0\..*"},
        {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]},
        {"target_modules": [*PROJECTIONS, "embed_tokens"]},
    ],
    ids=str,
)
def test_what_peft_writes_names_its_own_layers(base, tmp_path, settings):
    saved(base, tmp_path, **settings)
    assert read_peft(tmp_path).layers


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("task_type", "SEQ_CLS", "CAUSAL_LM is needed"),
        ("target_modules", ["q_proj"], r"the file has \S+v_proj"),
        ("target_modules", "nothing", r"the file has \S+_proj"),
        ("target_modules", "(", "cannot be used"),
        ("exclude_modules", ["v_proj"], r"the file has \S+v_proj"),
        ("layers_to_transform", [0], r"the file has \S+\.1\.\S+"),
        ("layers_to_transform", 1, r"the file has \S+\.0\.\S+"),
        ("modules_to_save", ["lm_head"], "the file has no lm_head"),
    ],
)
def test_a_configuration_of_other_layers_is_refused(base, tmp_path, field, value, problem):
    config = saved(base, tmp_path, target_modules=PROJECTIONS)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(AdapterError, match=problem):
        read_peft(tmp_path)
