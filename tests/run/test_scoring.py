"""Scores of runs and models."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.foundation.errors import CheckError, DataError, RecipeError
from qlora_lite.run.scoring import score_targets
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    save_tiny(folder / "base", "llama")
    rows = [{"q": f"what is {i} plus 2?", "a": f"it is {i + 2}."} for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


FIELDS = 'data.fields={"prompt": "q", "completion": "a"}'


def naive_score(folder):
    """Row by row with plain transformers, on what follows the generation prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    losses, hits = [], []
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["q"]}]
        conversation = [*asked, {"role": "assistant", "content": row["a"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(conversation, tokenize=False).rstrip()
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[0, start:], reduction="none"))
        hits.append(logits.argmax(-1) == ids[0, start:])
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()


def test_a_models_score_equals_that_of_plain_transformers_row_by_row(folder):
    [row] = score_targets([str(folder / "base")], str(folder / "rows.jsonl"), [FIELDS], "cpu")
    loss, accuracy = naive_score(folder)
    assert row.what == "model"
    assert row.score.loss == pytest.approx(loss, rel=1e-5)
    assert row.score.accuracy == pytest.approx(accuracy)


def test_settings_change_how_the_file_is_read(folder):
    [few] = score_targets(
        [str(folder / "base")], str(folder / "rows.jsonl"), [FIELDS, "data.max_rows=2"], "cpu"
    )
    [all_of_it] = score_targets(
        [str(folder / "base")],
        str(folder / "rows.jsonl"),
        [FIELDS, "data.loss_on=all", "data.packing=false"],
        "cpu",
    )
    assert few.score.num_targets < 20 < all_of_it.score.num_targets


def test_an_unknown_data_setting_is_refused(folder):
    with pytest.raises(RecipeError, match="'fields'"):
        score_targets([str(folder / "base")], str(folder / "rows.jsonl"), ["data.feilds=1"], "cpu")


def test_settings_for_held_out_rows_are_refused_with_a_file(folder):
    with pytest.raises(DataError, match=r"all rows of .* are scored\. Use data\.max_rows=N"):
        score_targets([str(folder / "base")], "rows.jsonl", ["data.max_heldout_rows=5"])


def test_a_model_without_rows_is_an_error_before_it_is_loaded(folder):
    with pytest.raises(DataError, match="--data"):
        score_targets([str(folder / "nothing")])


def test_a_loss_that_is_not_finite_is_a_failed_check(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["model.norm.weight"][3] = math.nan
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckError, match=r"damaged \(model\): the loss is nan"):
        score_targets([str(weights.parent)], str(folder / "rows.jsonl"), [FIELDS], "cpu")
