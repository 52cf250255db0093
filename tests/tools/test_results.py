"""Results of a real model: the choice of questions, the metrics, resuming, and the page."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.data.messages import Message
from qlora_lite.data.settings import Data
from qlora_lite.evaluation.generation import answer
from qlora_lite.foundation.errors import DataError, RunError
from qlora_lite.foundation.files import lock
from qlora_lite.model.causal import CausalModel
from qlora_lite.recipe_files import load_recipe
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("material", "metrics", "page", "questions", "schedule", "scoring", "store")


@pytest.fixture(scope="module")
def study():
    """The tool and its parts; their folder is on `sys.path` when the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools" / "benchmark")
        parts = {name: importlib.import_module(f"real_results.{name}") for name in PARTS}
        results = importlib.import_module("method_study.results")
        yield SimpleNamespace(
            tool=importlib.import_module("results"), Key=results.Key, Task=results.Task, **parts
        )


# ---------------------------------------------------------------------------------------- questions


def write_csv(path, rows):
    lines = ["mr,ref", *(f'"{mr}","{ref}"' for mr, ref in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def restaurants(tmp_path):
    """Forty meanings with one to three references each, of which the first five are trained."""
    train = write_csv(tmp_path / "train.csv", [(f"name[{i}]", f"{i}.") for i in range(5)])
    rows = [(f"name[{i}]", f"{i}, {j}.") for j in range(3) for i in range(40) if j <= i % 3]
    data = Data(train=train, fields={"completion": "ref"}, prompt="Describe: {mr}")
    return data, write_csv(tmp_path / "test.csv", rows)


def test_questions_are_chosen_by_the_seed_alone(study, restaurants):
    chosen = study.questions.choose_questions(*restaurants, 20)
    assert chosen == study.questions.choose_questions(*restaurants, 20)
    assert chosen != study.questions.choose_questions(*restaurants, 20, seed=1)
    assert len({question.text for question in chosen}) == 20


def test_no_question_is_trained_on_and_each_has_all_its_references(study, restaurants):
    chosen = study.questions.choose_questions(*restaurants, 35)
    numbers = sorted(int(question.text[len("Describe: name[") : -1]) for question in chosen)
    assert numbers == list(range(5, 40))
    for question in chosen:
        i = int(question.text[len("Describe: name[") : -1])
        assert question.references == tuple(f"{i}, {j}." for j in range(i % 3 + 1))
        assert question.row.messages[-1].content == f"{i}, 0."


def test_too_few_questions_are_refused(study, restaurants):
    with pytest.raises(DataError, match=r"has 35 questions that are not in .*, and 36 are needed"):
        study.questions.choose_questions(*restaurants, 36)


def test_questions_of_the_real_data_are_in_no_training_row(study, test_data, tmp_path):
    places = study.material.Places(tmp_path, test_data, tmp_path)
    for material in study.material.MATERIALS:
        words = study.material.assignments(material, 1, 0, "auto")
        recipe = study.material.recipe_of(words, places, tmp_path / "run")
        heldout = places.expand(material.heldout)
        chosen = study.questions.choose_questions(recipe.data, heldout, material.num_questions)
        assert len({question.prompt for question in chosen}) == material.num_questions
        if material is study.material.E2E:
            assert min(len(question.references) for question in chosen) >= 1
            assert max(len(question.references) for question in chosen) > 10


# ------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = $<<9*2=18>>18 a day.\n#### 18", 18),
        ("#### $1,200.00", 1200),
        ("#### -3", -3),
        ("#### 5\n#### 7 apples, not 8", 7),
        ("There are 3 boxes, so the answer is 12.", 12),
        ("It costs $2.50.", Decimal("2.5")),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_solution(study, text, number):
    assert study.metrics.final_number(text) == number


def test_exact_match_compares_numbers_and_not_their_text(study):
    answers = ["#### 1200", "the answer is 1,200.0", "#### 120", "", "2 + 3 = 6\n#### 5"]
    references = [("x\n#### 1,200",)] * 4 + [("2 + 3 = <<2+3=5>>5\n#### 5",)]
    assert study.metrics.measure("exact match", answers, references) == {"exact match": 0.6}


def test_a_label_is_the_first_digit_of_an_answer(study):
    answers = ["1", "The answer is 0.", "1 (not 0)", "positive", ""]
    references = [("1",), ("0",), ("0",), ("1",), ("0",)]
    assert study.metrics.measure("accuracy", answers, references) == {"accuracy": 0.4}


def test_bleu_uses_every_reference_of_every_answer(study):
    pytest.importorskip("sacrebleu")
    sentence = "The Punter is a cheap coffee shop near the river in the city centre ."
    references = [
        ("Nothing like it .",),
        ("Nothing like it .", "Nor this one here .", sentence),
        ("Nor this one here .", sentence),
    ]
    answers = ["Nothing like it .", sentence, sentence]
    found = study.metrics.measure("bleu", answers, references)
    assert found["bleu"] == pytest.approx(100)
    assert "nrefs:var" in found["signature"]
    only_first = study.metrics.measure("bleu", answers, [r[:1] for r in references])
    assert only_first["bleu"] < 20


def test_bleu_is_that_of_sacrebleu(study):
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog was in the garden all day"]
    references = [("the cat is on the mat today", "a cat sat on the mat"), ("a dog was here",) * 2]
    streams = [list(stream) for stream in zip(*references, strict=True)]
    expected = sacrebleu.corpus_bleu(answers, streams)
    assert study.metrics.measure("bleu", answers, references)["bleu"] == expected.score > 10


def test_a_model_is_scored_by_its_answers_tokens_and_asked_without_them(study, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [("what is the sea?", ("deep", "blue")), ("say 1", ("1",)), ("and the station?", ("0",))]
    questions = [study.questions.Question((Message("user", q),), r) for q, r in rows]
    material = replace(study.material.SST2, answer_tokens=6)
    found = study.scoring.score_model(CausalModel(model), tokenizer, material, questions)

    losses, texts = [], []
    for question, references in rows:
        user = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
        target = tokenizer(f"{references[0]}<|end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(target), reduction="none"
        ).tolist()
        texts.append(answer(model, tokenizer, prompt, [tokenizer.eos_token_id], 6))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert [sample["answer"] for sample in found["samples"]] == texts
    hits = [study.metrics.is_label(text, r[0]) for text, (_, r) in zip(texts, rows, strict=True)]
    assert found["accuracy"] == sum(hits) / 3


# --------------------------------------------------------------------------------- the whole tool


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny base, and a small folder of data sets."""
    folder = tmp_path_factory.mktemp("places")
    save_tiny(folder / "base")
    data = folder / "data"
    (data / "sst2").mkdir(parents=True)
    for name, start, num in (("train", 0, 60), ("dev", 1000, 20)):
        rows = [f"film {start + i} is {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(num)]
        (data / "sst2" / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def words_of(places, folder, *more):
    return [
        *(str(folder / "work"), "--model", str(places / "base"), "--data", str(places / "data")),
        *("--docs", str(folder / "docs"), "--only", "sst2", "--seeds", "1", "--jobs", "1"),
        *("--questions", "8", *more),
    ]


def environment():
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_tool_continues_with_the_run_that_it_was_in(study, places, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "benchmark" / "results.py")]
    words = words_of(places, tmp_path, "--steps", "60")
    stored = tmp_path / "docs" / "benchmarks" / "results"
    run = tmp_path / "work" / "sst2-0"
    with subprocess.Popen([*command, *words], env=environment(), stdout=subprocess.PIPE) as first:
        wait_for(lambda: list(run.glob("checkpoints/step*")), first)
        first.send_signal(signal.SIGKILL)
    assert [file.name for file in stored.iterdir()] == ["sst2-base-0.json"]
    base = (stored / "sst2-base-0.json").read_bytes()
    wait_for(lambda: is_free(run))
    assert not (run / "adapter").exists()
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert 0 < steps < 60

    again = subprocess.run(
        [*command, *words], env=environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "2 measurements, 1 done\nrun: lora on sst2, seed 0: " in again.stdout
    names = ["base", "merged-original", "merged-trained", "run"]
    assert sorted(file.name for file in stored.iterdir()) == [f"sst2-{n}-0.json" for n in names]
    assert (stored / "sst2-base-0.json").read_bytes() == base
    values = json.loads((stored / "sst2-run-0.json").read_text())["values"]
    assert values["training"]["steps"] == 60
    assert values["training"]["cpu_seconds"] is None  # part of it was in the killed process
    assert values["loss"] < json.loads(base)["values"]["loss"]
    merged = json.loads((stored / "sst2-merged-trained-0.json").read_text())["values"]
    assert merged["loss"] == pytest.approx(values["loss"], abs=0.05)
    assert not list((tmp_path / "work").glob("*merged*"))

    page = (tmp_path / "docs" / "results.md").read_text()
    assert "**A short trial of the tool, not results:**" in page
    assert f"| after training (1 seed) | {values['loss']:.3f} | {values['accuracy']:.3f} |" in page
    assert str(tmp_path) not in page + "".join(file.read_text() for file in stored.iterdir())


def wait_for(condition, process=None, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.05)


def is_free(run):
    """Whether the process that trained `run` has ended, which follows that of the tool."""
    try:
        with lock(run):
            return True
    except RunError:
        return False


def test_a_stored_measurement_is_not_mixed_with_other_settings(study, tmp_path):
    store = study.store.Store(tmp_path)
    key = study.Key("run", "lora", "e2e", 1)
    store.write(study.Task(key, {"questions": 200}, dict), {"loss": 1.0}, 20.0)
    assert store.has(study.Task(key, {"questions": 200}, dict))
    assert not store.has(study.Task(study.Key("run", "lora", "e2e", 2), {}, dict))
    with pytest.raises(RunError, match="questions: 200 -> 100"):
        store.has(study.Task(key, {"questions": 100}, dict))


def test_the_printed_command_gives_the_recipe_that_was_run(study, places, tmp_path):
    where = study.material.Places(places / "base", places / "data", tmp_path)
    words = study.material.assignments(study.material.SST2, 7, 2, "fp32")
    recipe = study.material.recipe_of(words, where, tmp_path / "run")
    typed = study.material.command(words).removeprefix("qlora-lite train recipes/demo.py ")
    shell = f"MODEL={where.model} DATA={where.data}\nprintf '%s\\0' {typed}"
    printed = subprocess.run(["sh", "-c", shell], capture_output=True, check=True).stdout
    given = printed.decode().split("\0")[:-1]
    assert (
        load_recipe(ROOT / "recipes" / "demo.py").but(*given, f"output={recipe.output}") == recipe
    )
    assert (recipe.optim.steps, recipe.seed, recipe.base.compute) == (7, 2, "fp32")


def test_a_missing_model_or_data_set_is_one_message(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.tool.main([])
    assert "give WORK" in capsys.readouterr().err
    where = study.material.Places(tmp_path / "no.gguf", tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"no\.gguf does not exist\. Give the model with --model"):
        where.expand("base.model=$MODEL")


# ----------------------------------------------------------------------------------------- the page


def write_records(study, folder, data, kinds, **changes):
    """Files as the tool writes them: `{kind: values of each seed}`."""
    settings = {"model": "m.gguf", "command": "qlora-lite train x", "questions": 9}
    settings |= {"threads": 1, "is_short": False} | changes
    training = {"steps": 100, "tokens": 90_000, "seconds": 60.0, "peak_bytes": 3 * 2**30}
    training |= {"predicted_peak_bytes": 2**32, "trained_parameters": 10}
    samples = [{"question": "a|b\nc", "answer": "yes", "reference": "no"}]
    for kind, seeds in kinds.items():
        for seed, measured in enumerate(seeds):
            more = {"training": training | {"cpu_seconds": 90.0}} if kind == "run" else {}
            values = {"cpu_seconds": 30.0, "compute": "bf16", "samples": samples} | more | measured
            task = study.Task(study.Key(kind, "lora", data, seed), settings, dict)
            study.store.Store(folder / "benchmarks" / "results").write(task, values, 1.0)


def rendered(study, docs):
    docs.mkdir(exist_ok=True)
    study.tool.main(["--render", "--docs", str(docs)])
    return (docs / "results.md").read_text(encoding="utf-8")


def test_the_page_is_made_of_the_stored_files(study, tmp_path):
    runs = [{"loss": 1.5, "bleu": 40.0}, {"loss": 1.6, "bleu": 41.0}, {"loss": 1.7, "bleu": 42.0}]
    kinds = {"base": [{"loss": 2.5, "bleu": 3.25}], "run": runs}
    write_records(study, tmp_path, "e2e", kinds)
    page = rendered(study, tmp_path)
    assert (
        "| | loss | BLEU |\n|---|---:|---:|\n"
        "| before training | 2.500 | 3.2 |\n"
        "| after training (3 seeds) | 1.600 ± 0.100 | 41.0 ± 1.0 |\n"
        "| after training, seed 0 | 1.500 | 40.0 |\n"
        "| seed 0 merged to bf16 on the trained base | not measured | not measured |\n"
    ) in page
    assert "in 2 min 00 s of CPU time" in page
    assert "1 min 00 s of wall-clock time and 1 min 30 s of CPU time per run" in page
    assert "3.00 GiB, predicted 4.00 GiB" in page
    assert "| a\\|b c | yes | yes | no |" in page
    assert "qlora-lite train x\n" in page
    assert "short trial" not in page
    assert "GSM8K" not in page


@pytest.mark.parametrize(("match", "is_said"), [(0.01, True), (0.2, False)])
def test_an_exact_match_near_zero_is_said(study, tmp_path, match, is_said):
    write_records(study, tmp_path, "gsm8k", {"run": [{"loss": 1.0, "exact match": match}]})
    assert ("Exact match stays near zero" in rendered(study, tmp_path)) == is_said


def test_a_short_trial_is_labelled(study, tmp_path):
    write_records(study, tmp_path, "embedded", {"base": [{"loss": 4.0}]}, is_short=True)
    page = rendered(study, tmp_path)
    assert "## Questions about Python's standard library (a short trial)" in page
    assert "not results" in page


def test_a_page_without_measurements_says_how_to_make_them(study, tmp_path):
    assert "Nothing is measured yet" in rendered(study, tmp_path)
