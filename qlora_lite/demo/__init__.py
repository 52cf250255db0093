"""The embedded default and its story.

base/   a small Llama with tokenizer and chat template, made by `tools/build_demo_base.py`
data/   train.jsonl and heldout.jsonl: what an object of the standard library does
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
BASE = str(_FOLDER / "base")
TRAIN = str(_FOLDER / "data" / "train.jsonl")
HELDOUT = str(_FOLDER / "data" / "heldout.jsonl")
