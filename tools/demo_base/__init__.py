"""The making of the embedded default, from the text of Python to a folder with a model card.

docstrings.py    every docstring of the standard library, once, under its best name
questions.py     a question about an object, and the first sentence of its docstring
corpus.py        what pretraining may see, and what is held out
architecture.py  the settings of the base model, and the model with random weights
tokenizer.py     byte-level BPE and the chat template
pretraining.py   the training loop and what it measures
folder.py        the files of the base and of its rows, with the licence of the text
card.py          the model card
"""
