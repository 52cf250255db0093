"""`qlora-lite train`: what it shows, and how it goes on."""

import re
import signal

from tests.cli.workplace import run_command, run_file, start_process


def test_a_run_says_plan_row_progress_scores_memory_and_path(trained):
    said = trained.said.out
    stages = [
        "compute fp32",  # the device
        "linear layers in nf4",  # the plan
        "76 rows to train on, 4 held out",
        "[[It is",  # one row, with what of it is trained
        "step 1/6",
        "step 6/6",
        "(at the start) ->",
        "predicted (",
        str(trained.run / "adapter"),
    ]
    places = [said.index(stage) for stage in stages]
    assert places == sorted(places)
    assert re.search(r"step 6/6  loss \d\.\d+  [▁-█]+  [\d,]+ tokens/s  \d+ MiB  .* left", said)


def test_the_held_out_loss_falls(trained):
    before, after = re.search(
        r"loss ([\d.]+) \(at the start\) -> ([\d.]+)", trained.said.out
    ).groups()
    assert float(after) < float(before) - 1


def test_nothing_that_is_piped_has_control_codes(trained):
    assert "\x1b" not in trained.said.out + trained.said.err
    assert "\r" not in trained.said.out


def test_the_same_command_on_a_finished_run_says_so(trained):
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
    assert "going on after step 2" in extended.out
    assert "step 4/4" in extended.out
    assert (run / "adapter").is_dir()


def test_what_a_new_kind_keeps_is_said(recipe):
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
    assert f"going on after step {done}" in ended.out
    assert f"step {done + 1}/{done + 1}" in ended.out


def test_a_recipe_file_has_the_options_of_train(recipe):
    shown = run_file(recipe, "--help")
    assert shown.status == 0
    assert "--extend" in shown.out
    refused = run_file(recipe, "optm.lr=1")
    assert refused.status == 2
    assert "Did you mean 'optim'" in refused.err
