"""`qlora-lite train`: what it prints, and how it resumes."""

import re
import signal

from tests.cli.workplace import run_command, run_file, start_process


def test_a_run_prints_plan_row_progress_scores_memory_and_path(trained):
    printed = trained.ended.out
    stages = [
        "compute fp32",  # the device
        "linear layers in nf4",  # the plan
        "76 rows to train on, 4 held out",
        "[[It is",  # one row with its trained tokens
        "step 1/6",
        "step 6/6",
        "(at the start) ->",
        "predicted (",
        str(trained.run / "adapter"),
    ]
    places = [printed.index(stage) for stage in stages]
    assert places == sorted(places)
    assert re.search(r"step 6/6  loss \d\.\d+  [▁-█]+  [\d,]+ tokens/s  \d+ MiB  .* left", printed)


def test_the_held_out_loss_falls(trained):
    before, after = re.search(
        r"loss ([\d.]+) \(at the start\) -> ([\d.]+)", trained.ended.out
    ).groups()
    assert float(after) < float(before) - 1


def test_piped_output_has_no_control_codes(trained):
    assert "\x1b" not in trained.ended.out + trained.ended.err
    assert "\r" not in trained.ended.out


def test_train_reports_that_a_run_is_already_finished(trained):
    ended = run_command("train", trained.recipe)
    assert ended.status == 0
    assert f"{trained.run} is finished after 6 steps" in ended.out
    assert "step 1/" not in ended.out


def test_a_finished_run_is_extended_on_request(recipe):
    run = recipe.with_name("run")
    assert run_command("train", recipe, "optim.steps=2").status == 0
    refused = run_command("train", recipe, "optim.steps=4")
    assert refused.status == 2
    assert "--extend" in refused.err
    extended = run_command("train", recipe, "optim.steps=4", "--extend")
    assert extended.status == 0
    assert "resuming after step 2" in extended.out
    assert "step 4/4" in extended.out
    assert (run / "adapter").is_dir()


def test_train_reports_which_settings_another_method_keeps(recipe):
    ended = run_command("train", recipe, "adapter=rslora", "optim.steps=1")
    assert ended.status == 0
    assert "adapter=rslora: kept rank=4" in ended.out


def test_ctrl_c_saves_with_status_130_and_the_file_itself_continues(recipe):
    rarely = ["checkpoints.every=3000", "evaluation.every=3000"]
    process = start_process("-m", "qlora_lite", "train", recipe, "optim.steps=3000", *rarely)
    assert process.stdout is not None
    while "step 1/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    done = int(re.search(r"SIGINT after step (\d+)", err)[1])

    text = recipe.read_text(encoding="utf-8").replace("steps=6", f"steps={done + 1}")
    recipe.write_text(text, encoding="utf-8")
    ended = run_file(recipe, *rarely, "--extend")
    assert ended.status == 0, ended.err
    assert f"resuming after step {done}" in ended.out
    assert f"step {done + 1}/{done + 1}" in ended.out


def test_a_recipe_file_has_the_options_of_train(recipe):
    shown = run_file(recipe, "--help")
    assert shown.status == 0
    assert "--extend" in shown.out
    refused = run_file(recipe, "optm.lr=1")
    assert refused.status == 2
    assert "Did you mean 'optim'" in refused.err
