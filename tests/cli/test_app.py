"""The other commands, each on a tiny base."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.cli.workplace import run_command


def test_plan_prints_bytes_verdict_and_time_without_reading_data(recipe):
    (recipe.parent / "train.jsonl").unlink()
    ended = run_command("plan", recipe)
    assert ended.status == 0
    for text in ("linear layers in nf4", "bits", "peak", "fits:", "parameters trained", "tokens/s"):
        assert text in ended.out


def test_a_plan_over_its_budget_has_status_2_and_lists_savings(recipe):
    ended = run_command("plan", recipe, "budget=10MiB", "base.quant=bf16")
    assert ended.status == 2
    assert "does not fit" in ended.out
    assert "base.quant=nf4" in ended.out
    assert "needed, 10.0 MiB allowed" in ended.err


def test_a_plan_of_several_processes_compares_the_zero_stages(recipe):
    alone = run_command("plan", recipe, "budget=1TiB")
    assert "per host" not in alone.out
    ended = run_command("plan", recipe, "budget=1TiB", "--processes", 3)
    assert ended.status == 0
    assert re.search(r"offload=zero3 offload\.parameters=cpu +- +[\d.]+ GiB +fits", ended.out)
    assert "recommended for 3 processes: offload=none" in ended.out
    tight = run_command("plan", recipe, "budget=10MiB", "--processes", 3)
    assert tight.status == 2
    assert "no stage fits in 3 processes" in tight.out
    zero = run_command("plan", recipe, "offload=zero2", "budget=1TiB")
    assert "recommended for 1 process: offload=none" in zero.out
    assert "optimizer states" in zero.out


def test_a_known_model_is_planned_offline(tmp_path):
    written = run_command("init", "Qwen/Qwen3-8B", "--output", tmp_path / "mine.py")
    assert written.status == 0, written.err
    ended = run_command("plan", tmp_path / "mine.py")
    assert ended.status in (0, 2)  # as large as this machine
    assert "on a base of 8.19 G" in ended.out


def test_an_unknown_setting_is_reported_with_its_path_and_the_nearest_match(recipe):
    ended = run_command("plan", recipe, "optim.learning=3", "optm.lr=1")
    assert ended.status == 2
    ended = run_command("plan", recipe, "adapter.rnak=3")
    assert ended.status == 2
    assert "adapter.rnak" in ended.err
    assert "'rank'" in ended.err


def test_a_missing_recipe_has_status_2(tmp_path):
    ended = run_command("train", tmp_path / "nowhere.py")
    assert ended.status == 2
    assert "nowhere.py" in ended.err


def test_preview_prints_tokens_lengths_and_counts(recipe):
    ended = run_command("preview", recipe, "--rows", 2)
    assert ended.status == 0
    assert "[[It is 0.<|end|>]]" in ended.out
    assert ended.out.count("[[") == 2
    for text in ("76 rows to train on", "p50", "dropped 0", "chat template", "#"):
        assert text in ended.out


def test_a_recipe_json_and_a_run_folder_are_recipes(trained):
    by_file = run_command("preview", trained.recipe)
    assert run_command("preview", trained.run).out == by_file.out
    assert run_command("preview", trained.run / "recipe.json").out == by_file.out


def test_eval_of_a_run_scores_the_bare_base_too(trained):
    ended = run_command("eval", trained.run)
    assert ended.status == 0
    bare = _losses(ended.out, "bare base")
    adapted = _losses(ended.out, "adapter")
    printed = re.search(r"loss ([\d.]+) \(at the start\) -> ([\d.]+)", trained.ended.out).groups()
    assert [f"{bare[0]:.3f}", f"{adapted[0]:.3f}"] == list(printed)


def test_eval_scores_several_targets_on_a_file(trained, tiny_base, tmp_path):
    rows = [{"q": f"What is seven times {i}?", "a": f"It is {7 * i}."} for i in range(30)]
    file = tmp_path / "other.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ended = run_command(
        "eval",
        trained.run,
        tiny_base,
        "--data",
        file,
        'data.fields={"prompt": "q", "completion": "a"}',
    )
    assert ended.status == 0, ended.err
    # the bare base in NF4 and the model itself are nearly the same
    assert _losses(ended.out, "model")[0] == pytest.approx(_losses(ended.out, "bare base")[0], 0.1)
    assert _losses(ended.out, "adapter")[0] < _losses(ended.out, "bare base")[0]


@pytest.mark.parametrize("arguments", [["{base}"], ["{run}", "data.max_rows=3"], ["data.x=1"]])
def test_eval_without_rows_or_model_has_status_2(arguments, trained, tiny_base):
    ended = run_command("eval", *(a.format(base=tiny_base, run=trained.run) for a in arguments))
    assert ended.status == 2
    assert ended.err


def test_chat_answers_piped_lines_one_by_one(trained):
    lines = "What is seven times 3?\n/reset\nWhat is seven times 3?\n/exit\nnever asked\n"
    ended = run_command("chat", trained.run, "--max-new-tokens", 8, typed=lines)
    assert ended.status == 0, ended.err
    first, cleared, second = ended.out.splitlines()
    assert first == second != ""
    assert cleared == "(history cleared)"


def test_chat_answers_one_prompt_and_exits(tiny_base):
    ended = run_command("chat", tiny_base, "--prompt", "hello", "--max-new-tokens", 4)
    assert ended.status == 0
    assert ended.out.strip()


def test_chat_with_an_empty_folder_has_status_2(tmp_path):
    assert run_command("chat", tmp_path).status == 2


def test_merge_writes_a_model_that_scores_like_the_adapter(trained, tmp_path):
    out = tmp_path / "merged"
    ended = run_command("merge", trained.run, out, "--base", "trained", "--dtype", "fp32")
    assert ended.status == 0, ended.err
    assert str(out) in ended.out
    data = trained.run.with_name("train.jsonl")
    scores = run_command("eval", trained.run, out, "--data", data, "data.max_tokens=128").out
    expected = _losses(scores, "adapter")[0]  # printed with four decimals
    assert _losses(scores, "model")[0] == pytest.approx(expected, abs=1.01e-4)


def test_a_merge_prints_its_candidates(trained, tmp_path):
    ended = run_command("merge", trained.run, tmp_path / "merged", "--shard", "100kB")
    assert ended.status == 0, ended.err
    for candidate in ("adapter on its base", "on the base as trained", "on the original base"):
        assert candidate in ended.out
    assert ended.out.count(" written") == 1
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1


def test_an_unknown_format_is_refused_with_the_known_ones(trained, tmp_path):
    ended = run_command("merge", trained.run, tmp_path / "out", "--format", "gguf")
    assert ended.status == 2
    assert "hf" in ended.err


def test_extract_writes_the_trained_rank_and_refuses_another(trained, tmp_path):
    rank = json.loads((trained.run / "adapter" / "adapter_config.json").read_text())["r"]
    ended = run_command("extract", trained.run, tmp_path / "same", "--rank", rank)
    assert ended.status == 0, ended.err
    assert f"a PEFT adapter of rank {rank}, without loss" in ended.out
    refused = run_command("extract", trained.run, tmp_path / "less", "--rank", rank - 1)
    assert refused.status == 2
    assert f"no adapter of rank {rank - 1}" in refused.err


def test_a_plan_that_does_not_fit_the_free_memory_has_status_2(recipe, monkeypatch):
    monkeypatch.setattr("qlora_lite.run.planning.available_bytes", lambda device: 2**20)
    ended = run_command("plan", recipe)
    assert ended.status == 2
    assert "no budget=... is given" in ended.out


@pytest.mark.parametrize("arguments", [["--lr", "1e-4"], ["--learning-rate=1e-4"]])
def test_an_option_that_is_a_setting_is_answered_with_the_setting(recipe, arguments):
    ended = run_command("train", recipe, *arguments)
    assert ended.status == 2
    assert "Write optim.lr=1e-4" in ended.err


def test_a_run_that_does_not_exist_is_not_looked_for_on_the_hub(trained, monkeypatch):
    monkeypatch.chdir(trained.run.parent.parent)
    for name in ("runs/typo", f"{trained.run.parent.name}/typo"):
        start = time.monotonic()
        ended = run_command("chat", name)
        assert ended.status == 2
        assert "no such run or model here" in ended.err
        assert time.monotonic() - start < 10


def test_init_writes_a_formatted_recipe_that_loads(tiny_base, tmp_path):
    file = tmp_path / "new" / "mine.py"
    ended = run_command("init", tiny_base, "--output", file)
    assert ended.status == 0, ended.err
    assert run_command("plan", file).status == 0
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", file], check=True)
    assert run_command("init", tiny_base, "--output", file).status == 0
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    again = run_command("init", tiny_base, "--output", file)
    assert again.status == 2
    assert "overwritten" in again.err


def _losses(table, what):
    """The losses in the lines of one kind of a table."""
    return [float(x) for x in re.findall(rf"{what} +([\d.]+)", table)]
