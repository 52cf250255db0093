"""Code that comes with a base runs only if the command line or a Python recipe allows it."""

import json
import shutil
from pathlib import Path

import pytest

import qlora_lite
from qlora_lite.cli.trust import is_trusted, split_trust
from qlora_lite.export.directory import write_companions
from qlora_lite.foundation.errors import BaseModelError, DataError, ExportError, RecipeError
from qlora_lite.inspection.inspect import inspect
from qlora_lite.model.config import read_config
from qlora_lite.model.settings import Base
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.recipe_files import load_recipe, load_with_settings
from qlora_lite.run.chat import load
from qlora_lite.run.extracting import extract
from qlora_lite.run.merging import merge
from qlora_lite.run.scoring import score_targets
from qlora_lite.run.training import run_recipe
from qlora_lite.shards.reader import SafetensorsCheckpoint
from tests.cli.workplace import run_command
from tests.end_to_end.small_run import recipe_in, write_rows
from tests.tiny import save_tiny, tiny_tokenizer

HINT = r"base\.trust_remote_code=true"
OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

    def __init__(self, **settings):
        Path({mark!r}).write_text("this code ran")
        super().__init__(**settings)

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose base has its own code, trained by a recipe that allows it, and the file that
    the code writes whenever it runs."""
    folder = tmp_path_factory.mktemp("trust")
    base, mark = save_tiny(folder / "base"), folder / "mark"
    write_rows(folder / "train.jsonl")
    edit(
        base / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    (base / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    with pytest.MonkeyPatch.context() as patch:
        modules = str(folder / "modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        run_recipe(recipe_in(folder, "run", "optim.steps=1", "base.trust_remote_code=true"))
        assert mark.is_file()
        yield folder / "run", mark


def edit(file: Path, **changes) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


VERBS = {
    "load": lambda run, out: qlora_lite.load(run),
    "merge": merge,
    "extract": lambda run, out: extract(run, out, 2),
    "eval": lambda run, out: score_targets([str(run)]),
    "inspect": lambda run, out: inspect([run]),
    "recipe": lambda run, out: load_recipe(run),
}
COMMANDS = ["train", "plan", "preview", "merge", "eval", "chat", "inspect", "extract"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_json_recipe_cannot_let_code_run(tmp_path, run, verb):
    folder, mark = run
    mark.unlink(missing_ok=True)
    with pytest.raises(RecipeError, match=rf"recipe\.json has {HINT}.*add {HINT}"):
        VERBS[verb](folder, tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_and_takes_the_setting(tmp_path, run, command):
    folder, _ = run
    arguments = {
        "merge": [folder, tmp_path / "out"],
        "extract": [folder, tmp_path / "out", "--rank", 2],
        "chat": [folder, "--prompt", "a", "--max-new-tokens", 1],
    }.get(command, [folder])
    refused = run_command(command, *arguments)
    assert refused.status == 2
    assert "base.trust_remote_code=true" in refused.err
    allowed = run_command(command, *arguments, "base.trust_remote_code=true")
    assert (allowed.status == 0) or (command == "extract" and "rank 2" in allowed.err), allowed.err


def test_in_python_an_argument_allows_it(run):
    folder, mark = run
    mark.unlink(missing_ok=True)
    model, _ = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert mark.exists()


def test_a_command_line_setting_wins_over_the_json(run):
    folder, _ = run
    recipe, _ = load_with_settings(folder, ["base.trust_remote_code=false"])
    assert not recipe.base.trust_remote_code
    with pytest.raises(RecipeError, match=HINT):
        load_with_settings(folder, ["optim.lr=1e-3"])


def test_commands_without_settings_take_only_this_one():
    assert split_trust(["a", "base.trust_remote_code=True"]) == (["a"], True)
    assert not is_trusted(["base.trust_remote_code=false"])
    for wrong in ("base.trust_remote_code=maybe", "optim.lr=1"):
        with pytest.raises(RecipeError, match=r"base\.trust_remote_code"):
            is_trusted([wrong])


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/x.safetensors", "x.bin", "a/b", ""])
def test_an_index_names_only_files_of_its_own_folder(tmp_path, name):
    index = {"weight_map": {"a.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_tiny(tmp_path / "x")
    shutil.copyfile(tmp_path / "x" / "model.safetensors", tmp_path.parent / "other.safetensors")
    with pytest.raises(BaseModelError, match=r"only safetensors files in its own folder"):
        SafetensorsCheckpoint.open(tmp_path)


@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
def test_a_config_that_names_code_on_the_hub_is_refused(tmp_path, tiny_llama, field):
    shutil.copytree(tiny_llama, tmp_path / "base")
    edit(tmp_path / "base" / "config.json", **{field: "somebody/kernel"})
    with pytest.raises(BaseModelError, match=f"{field}='somebody/kernel'.*code on the hub"):
        read_config(str(tmp_path / "base"))


def test_a_tokenizer_with_its_own_code_is_refused(tmp_path, tiny_llama):
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    automatic = {"AutoTokenizer": [None, "own.Tokenizer"]}
    edit(base / "tokenizer_config.json", auto_map=automatic, tokenizer_class="Own")
    with pytest.raises(BaseModelError, match=HINT):
        load_tokenizer(Base(model=str(base)))


@pytest.mark.parametrize("text", ["{% include 'secret' %}", "{% import '/etc/passwd' as x %}"])
def test_a_chat_template_reads_no_files(text):
    from qlora_lite.data.templates import ChatTemplate

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    with pytest.raises(DataError, match="chat template fails"):
        ChatTemplate(tokenizer)


def test_a_licence_that_links_out_of_the_base_is_not_published(tmp_path, tiny_llama):
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (tmp_path / "secret").write_text("secret")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"LICENSE is a link to .*secret"):
        write_out(tmp_path / "out", base)


def test_a_licence_in_the_hubs_cache_is_published(tmp_path, tiny_llama):
    base = Path(shutil.copytree(tiny_llama, tmp_path / "models--a--b" / "snapshots" / "1"))
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "abc").write_text("MIT")
    (base / "LICENSE").symlink_to("../../blobs/abc")
    (tmp_path / "out").mkdir()
    write_out(tmp_path / "out", base)
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"


def write_out(out, base):
    import torch

    write_companions(
        out, base, tiny_tokenizer(), dtype=torch.float32, is_tied=None, end_ids=[1], with_code=False
    )
