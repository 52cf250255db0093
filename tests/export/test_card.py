"""The card of a merged model: a YAML head, valid for any strings, and a readable body."""

from dataclasses import replace

import pytest
import yaml

from qlora_lite.export.card import Card, licence_of, render

CARD = Card(
    title="my model",
    base_model="owner/base",
    on_hub=True,
    licence={"license": "apache-2.0"},
    commands=("qlora-lite train recipe.json", "qlora-lite merge run out --base auto"),
    recipe={"base": {"model": "owner/base"}, "seed": 0},
    facts={"device": "CPU, 2 threads", "tokens": "12,345"},
    memory=[("peak", 3 * 2**30, 2 * 2**30), ("weights", 2**30, None)],
    losses=[3.0, 2.5, 2.0],
    heldout=[(0, 3.125), (10, 2.25)],
    samples=[("2 + 2?", "fish", "4")],
    merge=[("adapter on its base", 2.25, None, False), ("merged", 2.251, 0.993, True)],
    notes=["all is well"],
)


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("\n---\n", maxsplit=1)[0].removeprefix("---\n"))


def test_the_head_has_the_keys_of_the_hub():
    assert head_of(render(CARD)) == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }


def test_a_local_base_is_named_only_in_the_text():
    card = render(replace(CARD, base_model="my-base", on_hub=False))
    assert "base_model" not in head_of(card)
    assert "`my-base` fine-tuned" in card


@pytest.mark.parametrize(
    "name", ['a: b "c" #d', "- x", "'", "{y}", "@z", "true", "1.0", "a\n---\nb"]
)
def test_the_head_is_valid_yaml_for_any_name(name):
    card = render(
        replace(CARD, base_model=name, licence={"license": "other", "license_name": name})
    )
    head = head_of(card)
    assert " ".join(str(head["base_model"]).split()) == " ".join(name.split())
    assert " ".join(str(head["license_name"]).split()) == " ".join(name.split())


def test_an_unknown_licence_is_left_out(tmp_path):
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("# no head")
    assert licence_of(tmp_path) == {}
    assert "license" not in head_of(render(replace(CARD, licence={})))


def test_the_licence_is_read_from_the_bases_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\nlanguage: [en]\n---\n")
    assert licence_of(tmp_path) == {"license": "llama3.1"}


def test_the_body_contains_every_part():
    card = render(CARD)
    for part in (
        "qlora-lite merge run out --base auto",
        "| merged | 2.2510 | 99.30% | yes |",
        "- all is well",
        "3.000 -> 2.000",
        "| 10 | 2.2500 |",
        "before: fish",
        "| peak | 3.00 GiB | 2.00 GiB |",
        "| tokens | 12,345 |",
        '"seed": 0',
    ):
        assert part in card


def test_quoted_text_is_escaped():
    text = "```\n# I am a heading | and a <b>cell</b>"
    card = render(replace(CARD, samples=[(text, "", "")], facts={"device": text}))
    fence = card.index("````\nprompt: ```")
    assert card.index("````\n", fence + 4) > card.index("I am a heading")
    row = next(line for line in card.splitlines() if line.startswith("| device"))
    assert row.count(" | ") == 1
    assert "<b>" not in row


def test_parts_without_content_are_left_out():
    card = replace(CARD, merge=[], notes=[], losses=[], heldout=[], samples=[], memory=[], facts={})
    headings = [line for line in render(card).splitlines() if line.startswith("## ")]
    assert headings == ["## Recipe"]
