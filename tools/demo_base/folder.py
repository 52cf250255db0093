"""Write the files of the base and of its rows, and the licence of the text."""

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_base.docstrings import STDLIB
from demo_base.questions import Row


def save_base(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights in bf16, configuration, tokenizer and chat template."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    written["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows this name too
    write(folder / "tokenizer_config.json", json.dumps(written, indent=2) + "\n")


def save_rows(file: Path, rows: Sequence[Row]) -> None:
    """One conversation per line."""
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def save_licence(folder: Path) -> None:
    """Copy the licence of this Python, and write the notice."""
    folders = (STDLIB, STDLIB.parent, Path(sys.base_prefix))
    licence = next((f / "LICENSE.txt" for f in folders if (f / "LICENSE.txt").is_file()), None)
    if licence is None:
        raise SystemExit(
            "This Python has no LICENSE.txt, and the base must not be distributed without it. Use "
            "a Python from python.org, pyenv or conda."
        )
    write(folder / "LICENSE-PSF", licence.read_text(encoding="utf-8"))
    write(folder / "NOTICE", NOTICE.format(python=platform.python_version()))


def write(file: Path, text: str) -> None:
    """Write UTF-8 with \\n on every platform."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")


NOTICE = """\
The tokenizer and the weights in this folder were trained on, and the rows in ../data quote from,
pydoc_data.topics and the docstrings of the standard library of Python {python}.

Copyright (c) 2001 Python Software Foundation; All Rights Reserved.

That text is used under the licence of Python, which is in the file LICENSE-PSF.  Changes: docstrings
were dedented and put under a line with the name of their object; in the rows they are cut to their
first sentence, begin with a capital letter and end with a full stop.
"""  # noqa: E501
