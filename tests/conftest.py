"""What all tests share: one thread, GPU tests that say why they are skipped, the real data."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data sets: `QLORA_LITE_TEST_DATA`, or `shared/data` beside the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QLORA_LITE_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set QLORA_LITE_TEST_DATA to the real data sets")
    return folder
