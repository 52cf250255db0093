"""Inputs that would take hours or fill the memory end in an error within seconds."""

import json
import time

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_lite.data import jinja_templates
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.foundation.errors import BaseModelError, DataError
from qlora_lite.model.config_sizes import require_possible_numbers
from qlora_lite.model.facts import facts_of, read_facts
from qlora_lite.model.settings import Base
from tests.families import ALL
from tests.tiny import tiny_tokenizer

LOOPS = "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "nested ranges": "{% set s = range(99999) %}" + LOOPS,
    "nested texts": "{% set s = 'a' * 99999 %}" + LOOPS,
    "a huge text": "{{ 'a' * 10000000000 }}",
    "a product of numbers": "{% set n = 999999 %}{% set m = n * n %}{{ 'a' * m }}",
    "a text that doubles": (
        "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(99) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
    ),
    "padding": "{{ '%9999999999d' % 1 }}",
    "a filter": "{{ 'a' | center(99999999999) }}",
    "a list": "{{ [0] * 99999999999 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_end_is_refused(name, monkeypatch):
    monkeypatch.setattr(jinja_templates, "RENDER_SECONDS", 0.5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    start = time.monotonic()
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(tokenizer)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 0},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"num_attention_heads": 2**20, "hidden_size": 2**20},
        {"intermediate_size": -1},
    ],
    ids=str,
)
def test_sizes_of_no_possible_model_are_refused_before_it_is_built(sizes):
    start = time.monotonic()
    with pytest.raises(BaseModelError, match=r"hidden_size|layers|vocab_size|intermediate_size"):
        facts_of(CONFIG_MAPPING["llama"](**sizes))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("llama", "num_labels"),
        ("opt", "ffn_dim"),
        ("gpt2", "n_inner"),
        ("deepseek_v3", "n_shared_experts"),
        ("bart", "decoder_layers"),
        ("gemma3", "num_labels"),
    ],
)
def test_an_absurd_count_or_width_is_refused_before_transformers_reads_the_config(
    tmp_path, family, field
):
    values = {"model_type": family, field: 3 * 10**6}
    if family == "gemma3":
        values = {"model_type": family, "text_config": {field: 3 * 10**6}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    start = time.monotonic()
    with pytest.raises(BaseModelError, match=f"{field}: got 3000000, at most"):
        read_facts(Base(model=str(tmp_path)))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("family", ALL)
def test_the_sizes_of_every_architecture_are_possible(family):
    config = CONFIG_MAPPING[family]()
    require_possible_numbers(family, config.to_dict())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_million_experts_are_refused(family):
    name = "num_local_experts" if family == "mixtral" else "num_experts"
    with pytest.raises(BaseModelError, match="experts"):
        facts_of(CONFIG_MAPPING[family](**{name: 10**6}))
