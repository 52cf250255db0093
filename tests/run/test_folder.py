"""The rules about a run's folder: which recipe may use it, what may change, damaged files."""

import copy
import json
import shutil

import pytest
import safetensors.torch

from qlora_lite.foundation import files
from qlora_lite.foundation.errors import (
    AdapterError,
    BaseModelError,
    RecipeError,
    RunError,
    TrainingError,
)
from qlora_lite.foundation.sealed import hashes_of
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.inspection.inspect import inspect
from qlora_lite.recipe_files import load_recipe
from qlora_lite.run import folder as run_folder
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from qlora_lite.shards import fingerprint, reader, writer
from qlora_lite.training import checkpoint, metrics
from tests.damage import flip_bit
from tests.end_to_end.small_run import Killed, Killer, recipe_in, result_of, small_recipe
from tests.tiny import save_tiny
from tests.workbench_gguf import tiny_gguf_model, write_model_gguf


@pytest.fixture(scope="module")
def finished(folder):
    run_recipe(recipe_in(folder, "finished"))
    return folder / "finished"


def copy_of(run, folder, name, without=()):
    """An interrupted run: the checkpoints are there, the adapter is not."""
    copy = folder / name
    shutil.copytree(run, copy)
    for part in ("adapter", *without):
        shutil.rmtree(copy / part, ignore_errors=True)
    return copy


def test_a_moved_folder_is_still_the_run(folder, finished):
    moved = copy_of(finished, folder, "moved")
    for path in (moved, moved / "recipe.json"):
        assert load_recipe(path).output == str(moved)
    result = run_recipe(load_recipe(moved))
    assert result.directory == moved
    assert result_of(moved) == result_of(finished)


def test_a_copied_recipe_json_is_an_ordinary_recipe(finished, tmp_path):
    shutil.copy(finished / "recipe.json", tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json").output == str(finished)


def test_the_recipe_may_change_while_no_checkpoint_or_adapter_exists(folder):
    start = folder / "finished" / "adapter"
    with pytest.raises(AdapterError, match=r"Set adapter\.rank=4"):
        run_recipe(recipe_in(folder, "again", "adapter.rank=2", f"adapter.start={start}"))
    corrected = recipe_in(folder, "again", f"adapter.start={start}", "optim.steps=1")
    assert run_recipe(corrected).steps == 1
    with pytest.raises(RunError, match="belongs to a run with another recipe"):
        run_recipe(corrected.but("optim.lr=1e-3"))


def test_checkpoint_settings_may_change_when_a_run_continues(folder, finished):
    run = copy_of(finished, folder, "fewer")
    result = run_recipe(load_recipe(run).but("checkpoints.keep=1", "checkpoints.every=5"))
    assert result.scores == run_recipe(load_recipe(finished)).scores


@pytest.mark.parametrize("damage", ["", '{"st\n', None])
def test_a_run_continues_without_or_with_damaged_metrics(folder, finished, damage):
    run = copy_of(finished, folder, f"metrics-{damage!r:.4}".replace("'", ""))
    if damage is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text(damage)
    assert run_recipe(load_recipe(run)).scores == run_recipe(load_recipe(finished)).scores


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[]", b""])
def test_the_checkpoint_before_a_damaged_one_is_used(folder, finished, content):
    run = copy_of(finished, folder, f"state-{content.hex()}")
    (checkpoint.newest(run / "checkpoints") / "state.json").write_bytes(content)
    notes: list[str] = []
    assert checkpoint.find_newest(run / "checkpoints", notes.append).name == "step-000008"
    assert "is damaged" in notes[0]


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[]"])
@pytest.mark.parametrize("name", ["recipe.json", "adapter/qlora_lite.json"])
def test_a_damaged_record_is_named(folder, finished, tmp_path, name, content):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        load_run(run)


def test_a_base_that_changed_is_not_used(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    recipe = small_recipe(base, folder / "train.jsonl", tmp_path / "run", "optim.steps=1")
    run_recipe(recipe)
    shutil.rmtree(base)
    save_tiny(base, seed=5)
    with pytest.raises(RunError, match="its files changed"):
        load_run(tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(BaseModelError, match=f"base.model={base}"):
        load_run(tmp_path / "run")


def test_an_extension_needs_a_checkpoint_and_is_noted_until_it_is_finished(folder):
    recipe = recipe_in(folder, "extended", "optim.steps=2")
    run_recipe(recipe)
    assert RunFolder(folder / "extended").unfinished_extension() == []
    longer = recipe.but("optim.steps=4")

    class Killed(Watcher):
        def stepped(self, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(longer, extend=True, watcher=Killed())
    (note,) = RunFolder(folder / "extended").unfinished_extension()
    assert "is from step 2: its extension is not finished" in note
    notes = []

    class Notes(Watcher):
        def note(self, text):
            notes.append(text)

    load_run(folder / "extended", watcher=Notes())
    assert note in notes
    metrics = (folder / "extended" / "metrics.jsonl").read_bytes()
    shutil.move(folder / "extended" / "checkpoints", folder / "kept-checkpoints")
    with pytest.raises(RunError, match=r"no checkpoint left.*adapter\.start=.*extended/adapter"):
        run_recipe(longer, extend=True)
    assert (folder / "extended" / "metrics.jsonl").read_bytes() == metrics
    shutil.move(folder / "kept-checkpoints", folder / "extended" / "checkpoints")
    assert run_recipe(longer).steps == 4
    assert RunFolder(folder / "extended").unfinished_extension() == []


def test_settings_that_do_not_affect_results_may_change_after_a_run(folder):
    recipe = recipe_in(folder, "free", "optim.steps=1")
    run_recipe(recipe)
    free = ("evaluation.samples=0", "checkpoints.keep=1", "budget=2GiB")
    assert run_recipe(recipe.but(*free)).already_finished
    with pytest.raises(RunError, match=r"evaluation\.every: 6 -> 1"):
        run_recipe(recipe.but("evaluation.every=1"))


def test_a_folder_that_cannot_be_made_is_a_run_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be created"):
        run_recipe(recipe_in(folder, tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("owner", "name", "changes"),
    [(writer, "save_file", ["evaluation.patience=3"]), (files, "sync_tree", [])],
)
def test_a_full_disk_is_a_run_error_and_the_run_continues_later(
    folder, monkeypatch, owner, name, changes
):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    run = f"full-{name}"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(RunError, match=r"the disk is full.*Free some space"):
            run_recipe(recipe_in(folder, run, *changes))
    assert run_recipe(recipe_in(folder, run, *changes)).steps > 0


def test_a_base_with_nan_weights_is_not_blamed_on_the_learning_rate(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    recipe = small_recipe(base, folder / "train.jsonl", tmp_path / "run")
    with pytest.raises(TrainingError, match=r"before the first step .*damaged(.|\n)*line") as error:
        run_recipe(recipe)
    assert "optim.lr" not in str(error.value)


def test_a_finished_run_compares_with_the_recipe_that_trained_it(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "recipe.json").read_text()
    (run / "recipe.json").write_text(text.replace('"lr": 0.005', '"lr": 1.0'))
    with pytest.raises(RunError, match=r"optim\.lr: 0\.005 -> 1\.0"):
        run_recipe(load_recipe(run))


ADAPTER_FILES = ("native.safetensors", "adapter_model.safetensors", "adapter_config.json")


@pytest.mark.parametrize("name", [*ADAPTER_FILES, "qlora_lite.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_run_whose_adapter_is_damaged_is_not_finished(finished, tmp_path, name, damage):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "adapter" / name
    if damage == "missing":
        file.unlink()
    else:
        flip_bit(file, file.stat().st_size // 2)
    with pytest.raises(RunError, match=rf"{name}.*(missing|changed|damaged).*delete .*adapter"):
        run_recipe(load_recipe(run))
    if name in ("native.safetensors", "qlora_lite.json"):
        with pytest.raises((AdapterError, RunError), match=name):
            load_run(run)
    shutil.rmtree(run / "adapter")
    run_recipe(load_recipe(run))
    assert result_of(run) == result_of(finished)


def test_every_byte_of_the_base_is_compared_by_merge(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_NUM_SAMPLES", 1)
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    run = tmp_path / "run"
    recipe = small_recipe(base, folder / "train.jsonl", run, "optim.steps=2")
    run_recipe(recipe)
    flip_bit(base / "model.safetensors", -1)
    load_run(run)  # samples only
    with pytest.raises(RunError, match="is not the one that"):
        merge(run, tmp_path / "out", base="original", verify=False)
    with pytest.raises(RunError, match=r"the base of .* changed since the run started"):
        run_recipe(recipe.but("optim.steps=4"), extend=True)


def test_a_large_base_is_hashed_at_the_end_of_its_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "FULLY_HASHED_BYTES", 0)
    notes = []

    class Notes(Watcher):
        def note(self, text):
            notes.append(text)

    run = tmp_path / "run"
    recipe = small_recipe(folder / "base", folder / "train.jsonl", run, "optim.steps=1")
    run_recipe(recipe, watcher=Notes())
    assert any("samples of its files were compared" in note for note in notes)
    assert RunFolder(run).read_sidecar()["base"]["sha256"] == (
        reader.SafetensorsCheckpoint.open(folder / "base").full_hash
    )


def test_a_recipe_edited_after_training_is_not_used(finished, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "recipe.json").read_text()
    for before, after in (('"rank": 4', '"rank": 8'), ('"lr": 0.005', '"lr": 1.0')):
        assert before in text
        (run / "recipe.json").write_text(text.replace(before, after))
        for use in (load_run, lambda run: merge(run, tmp_path / "out"), lambda run: inspect([run])):
            name = before.split('"')[1]
            with pytest.raises(RunError, match=rf"\.{name}: \S+ -> \S+\n.*was trained"):
                use(run)
    shutil.copytree(folder / "base", tmp_path / "moved-base")
    moved = text.replace(str(folder / "base"), str(tmp_path / "moved-base"))
    (run / "recipe.json").write_text(moved)
    assert load_run(run).recipe.base.model == str(tmp_path / "moved-base")


MAY_DIFFER = {
    *("base.model", "base.revision", "base.trust_remote_code"),
    *("data.train", "data.heldout", "adapter.start", "device"),
    *("output", "budget", "tracking", "checkpoints", "evaluation.samples", "offload"),
    *("optim.steps", "optim.epochs"),
}
"""Settings that do not change what was trained, whose files are checked by their contents, or that
differ while a run is extended."""

OTHER_VALUES = {
    "base.quant": {"kind": "int8"},
    "base.head": "int8",
    "base.attention": "eager",
    "base.compute": "bf16",
    "adapter.scaling": "alpha/sqrt(r)",
    "adapter.targets": "attention",
    "adapter.ranks": {"0": 8},
    "adapter.dtype": "fp32",
    "adapter.train_modules": ["lm_head"],
    "data.format": "messages",
    "data.fields": {"messages": "turns"},
    "data.columns": ["a"],
    "data.prompt": "{a}",
    "data.system": "Be brief.",
    "data.too_long": "drop",
    "data.loss_on": "all",
    "data.template": "chatml",
    "data.reasoning": "drop",
    "data.max_rows": 9,
    "optim.schedule": "constant",
    "optim.rounding": "stochastic",
    "optim.states": "8bit",
    "optim.betas": [0.8, 0.99],
}
"""A value that is allowed and not the one of the small recipe; numbers and flags are changed."""


def test_a_recipe_edited_in_any_other_setting_is_not_used(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    record = json.loads((run / "recipe.json").read_text())
    recipe = record["recipe"]
    groups = {name for name, values in recipe.items() if isinstance(values, dict)}
    settings = {f"{group}.{name}" for group in groups for name in recipe[group] if name != "kind"}
    settings |= recipe.keys() - groups
    for setting in settings:
        group, _, name = setting.partition(".")
        if {setting, group} & MAY_DIFFER:
            continue
        edited = copy.deepcopy(record)
        owner, key = (edited["recipe"][group], name) if name else (edited["recipe"], group)
        owner[key] = OTHER_VALUES.get(setting) or changed(owner[key])
        (run / "recipe.json").write_text(json.dumps(edited))
        with pytest.raises(RunError, match=f"was changed after its .*\n  {setting}"):
            RunFolder(run).trained_recipe()


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, float) and 0 < value <= 0.5:
        return value * 2
    return value + 1 if isinstance(value, int | float) else 1


def test_a_damaged_record_is_not_called_a_typing_error(finished, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "recipe.json").read_text()
    (run / "recipe.json").write_text(text.replace('"output"', '"out0ut"'))
    with pytest.raises(
        RecipeError, match=r"recipe\.json changed since the run wrote it: (?s:.*)out0ut"
    ):
        load_recipe(run)
    (run / "recipe.json").write_text(text.replace('"seed": 0', '"seed": 4'))
    with pytest.raises(RunError, match=r"seed: 4 -> 0\n.*recipe\.json changed since"):
        RunFolder(run).require_usable(recipe_in(folder, "finished"), extend=False)
    (run / "recipe.json").write_text(text)
    with pytest.raises(RunError) as refused:
        RunFolder(run).require_usable(recipe_in(folder, "finished", "seed=4"), extend=False)
    assert "changed since" not in str(refused.value)


def test_the_same_extension_again_is_finished(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    longer = load_recipe(run).but("optim.steps=13")
    assert run_recipe(longer, extend=True).steps == 13
    assert run_recipe(longer, extend=True).already_finished


@pytest.mark.parametrize("taken", ["folder", "lock"])
def test_a_run_stops_when_its_folder_is_taken_away(folder, taken):
    run = folder / f"without-{taken}"

    class Thief(Watcher):
        def stepped(self, metrics):
            if metrics["step"] == 2:
                shutil.rmtree(run) if taken == "folder" else (run / ".lock").unlink()

    with pytest.raises(RunError, match="moved or deleted while this process was using it"):
        run_recipe(recipe_in(folder, run.name), watcher=Thief())
    if taken == "folder":
        assert not run.exists()
    else:
        assert [line["step"] for line in metrics.read(run / "metrics.jsonl")] == [0, 1, 2]
        assert run_recipe(recipe_in(folder, run.name)).steps == 12


def test_a_checkpoint_is_not_written_into_a_folder_that_was_taken_away(folder):
    run = folder / "taken-before-saving"

    class Thief(Watcher):
        def evaluated(self, metrics):
            if metrics["step"] == 6:
                shutil.rmtree(run)

    with pytest.raises(RunError, match="moved or deleted while this process was using it"):
        run_recipe(recipe_in(folder, run.name, "checkpoints.every=6"), watcher=Thief())
    assert not run.exists()


def test_checkpoints_of_another_run_are_refused(finished, folder):
    other = run_recipe(recipe_in(folder, "other", "seed=5")).directory
    run = copy_of(finished, folder, "own", ["checkpoints"])
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    with pytest.raises(RunError, match=r"is of another run:\n  seed: 5 -> 0\n"):
        run_recipe(recipe_in(folder, "own"))
    assert not (run / "adapter").exists()


def test_a_run_with_a_damaged_log_is_finished_and_says_so(folder):
    recipe = recipe_in(folder, "damaged-log")
    with pytest.raises(Killed):
        run_recipe(recipe, watcher=Killer())
    path = folder / "damaged-log" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].replace('"seconds"', '"secands"')
    path.write_text("\n".join(lines) + "\n")
    notes = []

    class Notes(Watcher):
        def note(self, text):
            notes.append(text)

    run_recipe(recipe, watcher=Notes())
    assert any("metrics.jsonl is incomplete" in note for note in notes)
    assert (folder / "damaged-log" / "report.html").is_file()


def test_an_adapter_is_not_written_without_the_lock(folder):
    run = folder / "taken-before-the-end"

    class Thief(Watcher):
        def saved(self, step):
            if step == 12:
                (run / ".lock").unlink()

    with pytest.raises(RunError, match="moved or deleted while this process was using it"):
        run_recipe(recipe_in(folder, run.name), watcher=Thief())
    assert not (run / "adapter").exists()
    assert not (run / "report.html").exists()


def test_a_folder_deleted_while_a_checkpoint_is_written_is_one_error(folder, monkeypatch):
    run = folder / "deleted-in-between"

    def delete(directory, names):
        shutil.rmtree(run)
        return hashes_of(directory, names)

    monkeypatch.setattr(checkpoint, "hashes_of", delete)
    with pytest.raises(RunError, match="moved or deleted while this process was using it"):
        run_recipe(recipe_in(folder, run.name))
    assert not run.exists()


def test_a_refused_gguf_base_leaves_the_converted_files_of_the_run(folder):
    path = write_model_gguf(folder / "model.gguf", tiny_gguf_model("llama"))
    recipe = small_recipe(path, folder / "train.jsonl", folder / "of_gguf", "optim.steps=1")
    run_recipe(recipe)
    run = RunFolder(folder / "of_gguf")
    before = hashes_of(run.base_files, [path.name for path in run.base_files.iterdir()])
    assert run.require_base(recipe.base).directory == run.base_files
    write_model_gguf(path, tiny_gguf_model("llama_biased"))
    with pytest.raises(RunError, match="is not the one"):
        run.require_base(recipe.base)
    assert hashes_of(run.base_files, list(before)) == before
