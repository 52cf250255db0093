"""What all tests share: one thread, tiny models, the real data, and a skip for GPU tests."""

import gc
import os
from pathlib import Path

import pytest
import torch

from qlora_lite.demo.real_base import INSTALL, find_real_base
from tests.tiny import save_tiny

torch.set_num_threads(1)  # more threads do not help tiny tensors, and are slow on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_garbage() -> None:
    """Take what lives now out of the garbage collector's rounds.

    Merging and scoring collect garbage after each model. Going through all that is imported took
    0.3 s each time, most of a merge of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of one test file: a tiny Llama in base/, rows in train.jsonl."""
    from tests.end_to_end.small_run import write_rows

    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "base")
    write_rows(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in fp32, untied, in one file. Do not write into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bf16 whose head is its embedding, in 3 shards. Do not write into it."""
    directory = tmp_path_factory.mktemp("tiny") / "tied-llama"
    return save_tiny(directory, "llama", dtype=torch.bfloat16, tied=True, num_shards=3)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in fp32 with biases, Conv1D and a tied head. Do not write into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "gpt2", "gpt2", tied=True)


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The real chat model of the demo, a GGUF file. Mark tests that use it `real`."""
    if (file := find_real_base()) is None:
        pytest.skip(f"the real chat model is not installed: {INSTALL}")
    return file


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma 3 270M in K-quants, a base without a chat template: `QLORA_LITE_GEMMA3_GGUF`."""
    path = Path(os.environ.get("QLORA_LITE_GEMMA3_GGUF", ""))
    if not path.is_file():
        pytest.skip("QLORA_LITE_GEMMA3_GGUF is not the path of Gemma 3 270M in GGUF")
    return path


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The real data sets: `QLORA_LITE_TEST_DATA`, or `shared/data` next to the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QLORA_LITE_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set QLORA_LITE_TEST_DATA to the real data sets")
    return folder
