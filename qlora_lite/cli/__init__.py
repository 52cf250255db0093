"""The commands.

app.py       the verbs and their options
script.py    a recipe file as a command of its own
status.py    how a command ends
display.py   a run on a terminal, or as plain lines
tables.py    plans, scores and merges
rows.py      rows of data, with what of them is trained
chat.py      a conversation
inspect.py   what trained adapters look like
"""

from qlora_lite.cli.app import main

__all__ = ["main"]
