"""Build the embedded model, from the text of Python to a folder with a model card.

docstrings.py    every docstring of the standard library, once, under its best name
questions.py     a question about an object, and the first sentence of its docstring
corpus.py        the split into pretraining text and held-out objects
architecture.py  the settings of the base model, and the model with random weights
tokenizer.py     byte-level BPE and the chat template
pretraining.py   the training loop and its measurements
folder.py        write the files of the base and of its rows, and the licence of the text
card.py          the model card
"""
