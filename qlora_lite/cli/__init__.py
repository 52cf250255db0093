"""The commands.

entry.py     where `qlora-lite` starts
app.py       the commands and their options
script.py    a recipe file as a command: `python recipes/demo.py`
terminal.py  prepare the process for a command
status.py    errors to messages and exit statuses
display.py   print the stages of a run
meter.py     progress: a bar on a terminal, plain lines in a pipe
tables.py    tables of plans, scores and merges
rows.py      rows of data, with their trained tokens marked
chat.py      a conversation in the terminal
inspect.py   the command `inspect` and its tables
"""

from qlora_lite.cli.entry import main

__all__ = ["main"]
