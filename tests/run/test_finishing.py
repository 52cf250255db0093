"""What a run writes at its end."""

import json

import torch
from transformers import AutoTokenizer

from qlora_lite.run import finishing
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import recipe_in


def test_a_sample_has_the_answers_of_the_base_and_of_the_adapter(folder):
    changes = ("optim.lr=0.02", "evaluation.samples=1", "adapter.dtype=fp32")
    result = run_recipe(recipe_in(folder, "samples", *changes))
    (sample,) = result.samples
    assert sample.expected.startswith("it is ")
    assert sample.before != sample.after
    run = load_run(result.directory)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    question = sample.prompt.partition("\n")[2].partition("\n")[0]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).input_ids

    def answer():
        with torch.no_grad():
            output = run.model.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=1)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()

    assert sample.after == answer()
    with run.attached.disabled():
        assert sample.before == answer()


def test_a_method_that_changed_the_base_has_no_answer_before_training(folder):
    changes = ("adapter=loftq", "adapter.iterations=1", "optim.steps=1", "evaluation.samples=1")
    result = run_recipe(recipe_in(folder, "loftq", *changes))
    assert result.samples[0].before == "(not available: this method changed the base weights)"


def test_the_sidecar_has_what_a_merge_needs(folder):
    result = run_recipe(recipe_in(folder, "sidecar", "optim.steps=2", "evaluation.samples=0"))
    sidecar = json.loads((result.directory / "adapter" / "qlora_lite.json").read_text())
    base = sidecar["base"]
    assert (base["compute"], base["storage"], base["norms"]) == ("fp32", "bf16", "fp32")
    assert base["quant"] == {"kind": "nf4", "double_quant": True, "block_size": 64}
    assert (sidecar["steps"], sidecar["state"]) == (2, "last")
    assert sidecar["scores"] == result.scores


def test_the_peak_is_that_of_every_process_of_the_run(folder, monkeypatch):
    """A run that was resumed counts what the killed process took, as its log has it."""
    monkeypatch.setattr(finishing, "peak_bytes", lambda device: 1)
    result = run_recipe(recipe_in(folder, "peaks", "optim.steps=2"))
    events = metrics.read(result.directory / "metrics.jsonl")
    assert result.peak_bytes == max(event.get("peak_bytes", 0) for event in events) > 2**20
