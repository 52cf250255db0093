"""Where a config is found, and the errors if there is none."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.config import read_config

TINY_LLAMA = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)


def test_the_config_of_a_directory_is_read_from_it(tmp_path):
    TINY_LLAMA.save_pretrained(tmp_path)
    known = {"model_type": "gpt2"}
    assert read_config(str(tmp_path), known=known).hidden_size == 16


def test_a_known_config_is_used_without_asking_the_hub(hub):
    config = read_config("some/model", known={"model_type": "gpt2", "n_embd": 48})
    assert (config.model_type, config.hidden_size) == ("gpt2", 48)
    assert hub.requests == []


def test_a_cached_config_is_preferred_to_a_known_one(hub, tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    TINY_LLAMA.save_pretrained(snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    config = read_config("some/model", known={"model_type": "gpt2"})
    assert config.model_type == "llama"
    assert hub.requests == []


def test_an_address_or_a_file_is_not_a_hub_id(tmp_path):
    with pytest.raises(
        BaseModelError, match=r"is an address\. Give the model's id: Qwen/Qwen3-8B$"
    ):
        read_config("https://huggingface.co/Qwen/Qwen3-8B/tree/main")
    (tmp_path / "recipe.py").write_text("")
    for model in (str(tmp_path / "recipe.py"), ""):
        with pytest.raises(BaseModelError, match="this is not a model"):
            read_config(model)


@pytest.mark.parametrize("model", ["./runs/nothing", "/no/such/directory", "a b"])
def test_a_path_that_does_not_exist_is_not_a_hub_id(model):
    with pytest.raises(BaseModelError, match="no such directory"):
        read_config(model)


@pytest.mark.parametrize("model", ["models/nope.gguf", "nope.GGUF"])
def test_a_gguf_file_that_does_not_exist_is_refused_without_asking_the_hub(hub, model):
    with pytest.raises(BaseModelError, match=r"no such file\. Give the path of a GGUF file"):
        read_config(model)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "accept a licence"),
        (401, "RepoNotFound", "hf auth login"),
        (404, "RevisionNotFound", "not this revision"),
        (404, "EntryNotFound", "no config.json on the hub"),
    ],
)
def test_each_refusal_of_the_hub_has_its_message(hub, status, code, message):
    hub.answer = (status, code)
    with pytest.raises(BaseModelError, match=message):
        read_config("some/model", revision="v9")
    assert hub.requests


def test_without_a_network_the_message_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE is set"):
        read_config("some/model")
    assert hub.requests == []


class Hub(HTTPServer):
    """A local server that answers every request with one error of the hub."""

    answer: tuple[int, str] = (500, "")

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refuse)
        self.requests: list[str] = []


class Refuse(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.requests.append(self.path)
        status, code = self.server.answer
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A local server in place of the hub, and an empty cache."""
    server = Hub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
