"""Pretrain the embedded model: a small Llama, trained on the documentation of Python.

    python tools/build_demo_base.py                # rebuilds base/ and data/ in qlora_lite/demo
    python tools/build_demo_base.py --out DIR --minutes 1

The text is `pydoc_data.topics` and the docstrings of the standard library, which are part of every
Python installation, under the licence of Python.  Stages:

    objects -> seen or held out -> documents -> tokenizer -> model -> files and a model card

Each stage is a file in `tools/demo_base`; `corpus.py` explains which objects are held out.

With `--steps`, the same versions of Python and libraries and the same number of threads give the
same files, except for the seconds in the model card.
"""

import argparse
from pathlib import Path

import torch
from demo_base.architecture import Pretraining, new_model
from demo_base.card import card
from demo_base.corpus import collect
from demo_base.folder import save_base, save_licence, save_rows, write
from demo_base.pretraining import pretrain, steps_in
from demo_base.tokenizer import encode, train_tokenizer

DEMO = Path(__file__).resolve().parent.parent / "qlora_lite" / "demo"


def main() -> None:
    """Build the base, its rows and the model card from the text of this Python."""
    options = arguments()
    torch.set_num_threads(options.threads)
    settings = Pretraining()
    corpus = collect()
    print(
        f"{len(corpus.documents):,} documents, {len(corpus.held_out_rows)} objects held out",
        flush=True,
    )
    tokenizer = train_tokenizer(corpus.documents, settings.vocabulary)
    model = new_model(settings, tokenizer)
    steps = options.steps
    if options.minutes is not None:
        steps = steps_in(options.minutes, model, settings)
    result = pretrain(
        model,
        encode(corpus.documents, tokenizer),
        encode(corpus.held_out_documents, tokenizer),
        steps,
        settings,
    )
    base = options.out / "base"
    save_base(base, model, tokenizer)
    save_licence(base)
    save_rows(options.out / "data" / "train.jsonl", corpus.rows)
    save_rows(options.out / "data" / "heldout.jsonl", corpus.held_out_rows)
    write(base / "README.md", card(base, corpus, tokenizer, result, options.threads))
    print((base / "README.md").read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded model and make its rows.")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for base/ and data/")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=3000, help="optimizer steps (3000)")
    length.add_argument("--minutes", type=float, help="as many steps as fit, instead of --steps")
    # Measured on two cores: 2 threads are 1.5 times faster than 1 on an idle machine, and 20 times
    # slower on a busy one, since they wait for each other in a spin loop.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
