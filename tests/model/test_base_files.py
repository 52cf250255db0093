"""Bases in GGUF: their config and tokenizer are converted once, kept, and checked before use."""

import json
import shutil

import pytest
import torch

from qlora_lite.export.card import licence_of
from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.sealed import write_sealed
from qlora_lite.model import base_files
from qlora_lite.model.base_files import BaseFiles, locate, open_checkpoint
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import FP32
from qlora_lite.model.settings import Base
from qlora_lite.model.tokenizer import load_tokenizer
from tests.workbench_gguf import tiny_gguf_model, write_model_gguf


@pytest.fixture(scope="module")
def model():
    return tiny_gguf_model("llama")


@pytest.fixture(scope="module")
def gguf(model, tmp_path_factory):
    return write_model_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model)


def test_a_directory_is_its_own_files(tiny_llama):
    assert locate(Base(model=str(tiny_llama))) == BaseFiles(tiny_llama, tiny_llama)
    assert not locate(Base(model=str(tiny_llama))).is_gguf


def test_a_loaded_gguf_file_is_the_model_that_was_written(gguf, model):
    loaded = load_base(Base(model=str(gguf), quant=FP32()), choose("cpu", "fp32"))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
    assert loaded.files.is_gguf
    assert loaded.files.weights == gguf


def test_a_folder_with_one_file_is_that_file(gguf):
    assert locate(Base(model=str(gguf.parent))).weights == gguf


def test_a_vision_tower_next_to_it_does_not_count(gguf, tmp_path):
    shutil.copy(gguf, tmp_path / "model.gguf")
    shutil.copy(gguf, tmp_path / "mmproj-model.gguf")
    assert locate(Base(model=str(tmp_path))).weights == tmp_path / "model.gguf"


def test_what_was_converted_is_kept_and_used_again(gguf, tmp_path, monkeypatch):
    kept = tmp_path / "base"
    files = locate(Base(model=str(gguf)), kept)
    assert files.directory == kept
    names = {"config.json", "generation_config.json", "tokenizer.json", "converted.json"}
    assert names <= {path.name for path in kept.iterdir()}
    monkeypatch.setattr(base_files, "_convert", None)  # would raise TypeError if it were called
    assert locate(Base(model=str(gguf)), kept) == files
    assert len(load_tokenizer(Base(model=str(gguf)), kept)) == len(
        load_tokenizer(Base(model=str(kept)))
    )


@pytest.mark.parametrize("damage", ["bit", "missing", "record", "transformers", "version"])
def test_what_is_damaged_or_of_another_version_is_converted_again(gguf, tmp_path, damage):
    kept = tmp_path / "base"
    base = Base(model=str(gguf))
    locate(base, kept)
    config, sealed = ((kept / name).read_bytes() for name in ("config.json", "converted.json"))
    if damage == "bit":
        (kept / "config.json").write_bytes(config.replace(b'"hidden_size"', b'"hidden_sizf"'))
    elif damage == "missing":
        (kept / "tokenizer.json").unlink()
    elif damage == "record":
        (kept / "converted.json").write_text("{")
    else:
        record = json.loads((kept / "converted.json").read_text())
        write_sealed(kept / "converted.json", record | {damage: "0.1"}, record["files"])
    locate(base, kept)
    assert (kept / "config.json").read_bytes() == config
    assert (kept / "converted.json").read_bytes() == sealed
    assert (kept / "tokenizer.json").is_file()


def test_another_file_at_the_same_path_is_converted_again(model, tmp_path):
    path, kept = tmp_path / "model.gguf", tmp_path / "base"
    write_model_gguf(path, model)
    locate(Base(model=str(path)), kept)
    first = (kept / "converted.json").read_text()
    write_model_gguf(path, tiny_gguf_model("llama_biased"))
    locate(Base(model=str(path)), kept)
    assert (kept / "converted.json").read_text() != first
    assert json.loads((kept / "config.json").read_text())["attention_bias"] is True


def test_without_a_run_the_converted_files_are_temporary(gguf):
    first, second = (locate(Base(model=str(gguf))).directory for _ in range(2))
    assert first == second
    assert gguf.parent not in first.parents


def test_a_plan_reads_only_the_header(gguf, monkeypatch):
    monkeypatch.setattr(base_files, "_convert", None)
    facts = read_facts(Base(model=str(gguf)))
    assert facts.config.name_or_path == str(gguf)
    names = open_checkpoint(BaseFiles(gguf.parent, gguf), facts).names
    assert set(names) <= {parameter.name for parameter in facts.shape.parameters}


def test_licences_of_the_file_are_written_as_a_card(gguf, model, tmp_path):
    path = tmp_path / "model.gguf"
    write_model_gguf(path, model, keys=lambda writer: writer.add_license("apache-2.0"))
    assert licence_of(locate(Base(model=str(path)), tmp_path / "base").directory) == {
        "license": "apache-2.0"
    }
    assert licence_of(locate(Base(model=str(gguf)), tmp_path / "other").directory) == {}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all"])
def test_a_file_that_is_no_gguf_is_one_error(content, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BaseModelError, match=r"model\.gguf"):
        read_facts(Base(model=str(path)))


def test_a_token_id_of_0_is_kept(model, tmp_path):
    def pad(writer):
        writer.add_pad_token_id(0)

    path = write_model_gguf(
        tmp_path / "model.gguf", tiny_gguf_model("llama", pad_token_id=None), keys=pad
    )
    files = locate(Base(model=str(path)), tmp_path / "base")
    settings = json.loads((files.directory / "generation_config.json").read_text())
    assert settings["pad_token_id"] == 0


def test_a_file_in_place_of_the_converted_directory_is_replaced(gguf, tmp_path):
    kept = tmp_path / "base"
    kept.write_text("")
    files = locate(Base(model=str(gguf)), kept)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert (files.directory / "tokenizer.json").is_file()


def test_a_revision_of_a_file_is_refused(gguf):
    with pytest.raises(BaseModelError, match=r"base\.revision=main .* only models from the hub"):
        read_facts(Base(model=str(gguf), revision="main"))
