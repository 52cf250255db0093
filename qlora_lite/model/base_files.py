"""Where the files of a base are on this machine.

files = locate(Base(model="Qwen/Qwen3-8B"))    # downloads it, if it is not here
files.directory / "config.json"
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.files import is_directory
from qlora_lite.model.config import require_hub_id, unreachable
from qlora_lite.model.settings import Base


@dataclass(frozen=True)
class BaseFiles:
    """Where a base is on this machine."""

    directory: Path
    """With `config.json`, the tokenizer and generation settings."""

    weights: Path
    """The same directory, with its safetensors files."""

    @classmethod
    def of(cls, directory: Path) -> "BaseFiles":
        """The files of a model directory."""
        return cls(directory, directory)


def locate(base: Base) -> BaseFiles:
    """Find a base. From the hub, downloads only config, tokenizer and safetensors.

    Raises:
        BaseModelError: if there is no such model, or it cannot be downloaded.
    """
    if is_directory(Path(base.model)):
        return BaseFiles.of(Path(base.model))
    require_hub_id(base.model)
    code = ["*.py"] if base.trust_remote_code else []
    try:
        directory = snapshot_download(
            base.model,
            revision=base.revision,
            allow_patterns=["*.json", "model*.safetensors", "*.model", "*.jinja", "*.txt", *code],
            ignore_patterns=["*/*"],
        )
    except OSError as error:
        raise BaseModelError(unreachable(base.model, base.revision, error)) from error
    return BaseFiles.of(Path(directory))
