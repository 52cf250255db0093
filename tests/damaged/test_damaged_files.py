"""Damaged files end in an error that a user understands, or change nothing.

Every file that a command reads is damaged in many ways: emptied, cut, replaced by other JSON, and
each of its fields deleted or given a value of another type or size. Reading it then either raises a
`QloraLiteError`, or gives the same as the good file. Any other exception, a hang, and another
result are faults. `ALLOWED` lists the changes that mean something.
"""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from qlora_lite.adapters.files import read_native
from qlora_lite.adapters.peft import read_peft
from qlora_lite.adapters.warm_start import saved_state
from qlora_lite.data.messages import Message
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.export.card import licence_of
from qlora_lite.foundation.errors import BaseModelError, QloraLiteError, RecipeError
from qlora_lite.foundation.files import DiskFull
from qlora_lite.model.config import read_config, require_generation_settings
from qlora_lite.model.facts import facts_of, read_facts
from qlora_lite.model.prequantised import own_quant, skipped_layers
from qlora_lite.model.settings import Base
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.recipe_files import load_recipe
from qlora_lite.report import page
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from qlora_lite.shards.layout import TensorSpec
from qlora_lite.shards.reader import SafetensorsCheckpoint
from qlora_lite.shards.writer import ShardWriter
from qlora_lite.training import checkpoint, metrics
from qlora_lite.training.loop import Progress
from tests.damaged import damages
from tests.damaged.damages import Damage
from tests.end_to_end.small_run import recipe_in, write_rows
from tests.tiny import save_tiny

SECONDS = 20
SOME = 7
"""Every seventh damage is part of the ordinary run."""


def facts(folder: Path) -> Any:
    found = read_facts(Base(model=str(folder / "base")))
    return found.shape.parameters, found.context, found.tied, found.config.model_type


def stored_quantisation(folder: Path) -> Any:
    config = read_config(str(folder / "quantised"))
    return own_quant(config), skipped_layers(config)


def tokens(folder: Path) -> Any:
    tokenizer = load_tokenizer(Base(model=str(folder / "base")))
    template = ChatTemplate(tokenizer)
    text = template.prompt([Message("user", "what is a number?")])
    return tokenizer(text).input_ids, template.end_of_turn, tokenizer.pad_token_id


def shards(folder: Path) -> Any:
    return weights(folder, "shards")


def weights(folder: Path, name: str = "base") -> Any:
    found = SafetensorsCheckpoint.open(folder / name)
    read_facts(Base(model=str(folder / name))).match_names(found.names)
    return [(name, found.info(name).shape, found.read(name).sum().item()) for name in found.names]


def peft_adapter(folder: Path) -> Any:
    found = read_peft(folder / "run" / "adapter")
    return {p: (f.down.sum().item(), f.up.sum().item()) for p, f in found.layers.items()}


def own_state(folder: Path) -> Any:
    recipe = load_recipe(folder / "run" / "recipe.json")
    saved = saved_state(folder / "run" / "adapter", recipe.adapter)
    return None if saved is None else sorted(saved)


def native(folder: Path) -> Any:
    return sorted(read_native(folder / "run" / "adapter"))


def record(folder: Path) -> Any:
    run = RunFolder(folder / "run")
    run.read_record()
    return load_recipe(run.recipe).to_dict(), run.micro_batch_tokens, run.unfinished_extension()


def sidecar(folder: Path) -> Any:
    run = RunFolder(folder / "run")
    found = run.read_sidecar()
    recipe = load_recipe(run.recipe)
    run.require_base(recipe.base)
    used = ("steps", "scores", "data_fingerprint", "peak_bytes", "predicted_peak_bytes")
    return run.is_finished(recipe), {k: found[k] for k in used}, run.unfinished_extension()


def state(folder: Path) -> Any:
    found = checkpoint.load(newest(folder))
    return found.progress, sorted(found.engine), sorted(found.method)


def newest(folder: Path) -> Path:
    found = checkpoint.newest(folder / "run" / "checkpoints")
    assert found is not None
    return found


@dataclass(frozen=True)
class Case:
    """A file of the folder, and how it is read."""

    file: str
    read: Callable[[Path], Any]
    depth: int = 2
    """How deep fields are damaged; 0 for a file that is no JSON object."""
    allowed: str = "nothing"
    """A pattern of damages after which the file is still a possible one, of another content."""
    is_tensors: bool = False


CASES = [
    # what is deleted has transformers' default; flags may be either
    Case("base/config.json", facts, allowed=r"deleted|(bias|embeddings) is true|_heads is null"),
    # without these it is another possible quantisation
    Case(
        "quantised/config.json",
        stored_quantisation,
        allowed=r"^quantization_config (deleted|is null)|quant(_type)? deleted"
        r"|(8bit|double_quant) is true|skip_modules (deleted|is (null|list)$)",
    ),
    # a tokenizer may lack these, or have them as any text
    Case(
        "base/tokenizer_config.json",
        tokens,
        allowed=r"^(bos|pad)_token (deleted|is (null|.*text|path))",
    ),
    Case("base/tokenizer.json", tokens, 1, r"^(pre_tokenizer|post_processor) (deleted|is null)"),
    Case("base/generation_config.json", lambda f: require_generation_settings(f / "base")),
    Case("base/model.safetensors", weights, is_tensors=True),
    Case("shards/model.safetensors.index.json", shards),
    Case("shards/model-00001-of-00003.safetensors", shards, is_tensors=True),
    Case(
        "run/adapter/adapter_config.json", peft_adapter, allowed=r"alpha is fraction|rslora is true"
    ),
    Case("run/adapter/adapter_model.safetensors", peft_adapter, is_tensors=True),
    Case("run/adapter/native.safetensors", native, is_tensors=True),
    Case(
        "run/adapter/qlora_lite.json", sidecar, allowed=r"^recipe|is (fraction|object)"
    ),  # reported as another recipe
    Case("run/adapter/qlora_lite.json", own_state, 1),
    # settings with other values, which are checked where they are used
    Case(
        "run/recipe.json",
        record,
        allowed=r"^recipe\.\w+ (deleted|is object)|^recipe\.(seed|device)|tokens is null",
    ),
    Case("run/report.html", lambda f: page.read(f / "run" / "report.html"), 0),
    Case(
        "run/checkpoints/step-000002/state.json",
        state,
        allowed="early is true|nested|fraction|loss is null",
    ),
    Case("run/checkpoints/step-000002/adapter.safetensors", state, is_tensors=True),
    Case(
        "run/checkpoints/step-000002/optimizer.safetensors",
        state,
        is_tensors=True,
        allowed="no tensors",
    ),
]


QUANTISATION = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_skip_modules": ["lm_head"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A base, the same in shards, and a finished run."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n\n# A base\n")
    save_tiny(folder / "shards", num_shards=3)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "quantised").mkdir()
    (folder / "quantised" / "config.json").write_text(
        json.dumps(config | {"quantization_config": QUANTISATION})
    )
    write_rows(folder / "train.jsonl")
    run_recipe(recipe_in(folder, "run", "optim.steps=2"))
    return folder


def damages_of(case: Case, path: Path) -> list[Damage]:
    if case.is_tensors:
        return list(damages.safetensors())
    found = list(damages.whole_file())
    return [*found, *damages.fields(path, case.depth)] if case.depth else found


def faults(case: Case, folder: Path, part: slice) -> tuple[list[str], int]:
    """What went wrong with this file's damages, and how many were tried."""
    path = folder / case.file
    original, expected = path.read_bytes(), case.read(folder)
    tried = damages_of(case, path)[part]
    found = []
    for damage in tried:
        damage.apply(path)
        try:
            with limited(SECONDS):
                result = case.read(folder)
            if result != expected and not re.search(case.allowed, damage.name):
                found.append(f"{case.file}, {damage}: accepted as {str(result)[:200]}")
        except QloraLiteError as error:
            if not str(error).strip():
                found.append(f"{case.file}, {damage}: an empty message")
        except BaseException as error:
            found.append(f"{case.file}, {damage}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(original)
    return found, len(tried)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this, the main thread, after `seconds`."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}-{case.depth}")
def test_some_damages_of_each_file_are_errors_or_change_nothing(good, case):
    logging.set_verbosity_error()
    found, number = faults(case, good, slice(0, None, SOME))
    assert not found, "\n".join(found)
    assert number > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}-{case.depth}")
def test_all_damages_of_a_file_are_errors_or_change_nothing(good, case):
    logging.set_verbosity_error()
    found, _ = faults(case, good, slice(None))
    assert not found, "\n".join(found)


def test_there_are_hundreds_of_damages(good):
    assert sum(len(damages_of(case, good / case.file)) for case in CASES) > 1500


# -- files whose damage is reported in another way -------------------------------------------------


def test_lines_of_a_log_that_cannot_be_read_are_skipped(tmp_path):
    good_line = '{"step": 1, "loss": 2.0, "tokens": 9, "seconds": 0.5}'
    lines = [good_line, "", "[1]", '{"step": "x"}', '{"step": -1}', '{"loss": 1}', "{", "1" * 5000]
    lines += ['{"step": 2, "loss": "x"}', '{"step": 2, "loss": null}', damages.DEEP, '"\\ud800"']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert metrics.read(tmp_path / "metrics.jsonl") == [json.loads(good_line)]
    (tmp_path / "metrics.jsonl").write_bytes(bytes(range(256)))
    assert metrics.read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "head",
    ["license: [", "license: {a: 1}", "license: 3", "license: !!python/object:os.x {}", "- a"],
)
def test_a_card_that_cannot_be_read_has_no_licence(tmp_path, head):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(ValueError, match=r"README\.md (cannot be read|has license)"):
        licence_of(tmp_path)


def test_a_merge_with_a_broken_card_says_that_the_licence_is_unknown(good, tmp_path):
    (good / "base" / "README.md").write_text("---\nlicense: [\n---\n")
    try:
        result = merge(good / "run", tmp_path / "out", base="trained", verify=False)
    finally:
        (good / "base" / "README.md").unlink()
    assert any("that of the base is unknown" in note for note in result.notes)
    assert "license" not in (tmp_path / "out" / "README.md").read_text().partition("\n---")[0]


def test_folders_with_other_names_are_no_checkpoints(good):
    for name in ("step-foo", "step-", "step-000001.old", "step--1"):
        (good / "run" / "checkpoints" / name).mkdir()
    assert newest(good).name == "step-000002"
    recipe = load_recipe(good / "run").but("optim.steps=3")
    assert run_recipe(recipe, extend=True).steps == 3


def test_the_numbers_of_a_checkpoint_are_the_fields_of_progress():
    assert set(checkpoint.ProgressNumbers.model_fields) == {
        f.name for f in dataclasses.fields(Progress)
    }


def test_a_full_disk_while_the_tokenizer_is_saved_is_reported(good, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        merge(good / "run", tmp_path / "out", base="trained", verify=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"identity": 1}', "\x00", damages.DEEP])
def test_a_damaged_journal_starts_the_files_again(tmp_path, content):
    (tmp_path / ".shards.jsonl").write_text(content)
    assert written(tmp_path).sum() == 2


@pytest.mark.parametrize("value", damages.VALUES.values(), ids=damages.VALUES)
@pytest.mark.parametrize("field", ["file", "end", "sha256"])
def test_a_damaged_line_of_a_journal_starts_its_file_again(tmp_path, field, value):
    with pytest.raises(ZeroDivisionError):
        written(tmp_path, stops=True)
    journal = tmp_path / ".shards.jsonl"
    first, *others = journal.read_text().splitlines()
    damaged = [json.dumps(json.loads(line) | {field: value}) for line in others]
    assert damaged
    journal.write_text("\n".join([first, *damaged]))
    assert written(tmp_path).sum() == 2


def written(directory: Path, stops: bool = False) -> torch.Tensor:
    """Write two tensors, or stop after the first, and read one back."""
    specs = [TensorSpec(name, torch.float32, (2,)) for name in ("a", "b")]
    with ShardWriter(directory, specs, "identity") as writer:
        for spec in writer.pending:
            writer.write(spec.name, torch.ones(2))
            if stops:
                raise ZeroDivisionError
    return SafetensorsCheckpoint.open(directory).read("a")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv", "falcon_mamba"])
def test_an_architecture_without_uniform_attention_is_refused(family):
    with pytest.raises(BaseModelError, match=f"the architecture {family} is not supported yet"):
        facts_of(CONFIG_MAPPING[family](num_hidden_layers=2))


@pytest.mark.parametrize("prompt", ["{prompt!z}", "{prompt:>9999999999}", "{prompt.a}", "{", "{0}"])
def test_a_prompt_that_cannot_be_filled_is_refused(good, prompt):
    with pytest.raises(RecipeError, match=r"data\.prompt"):
        recipe_in(good, "other", f"data.prompt={prompt}")
