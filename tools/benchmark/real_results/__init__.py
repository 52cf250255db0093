"""The measurements of docs/results.md: a real model on real tasks, before and after training.

material.py   the data sets: recipe settings, the rows that are asked, and the metric
questions.py  the held-out questions, fixed by a seed, with all their references
metrics.py    BLEU, accuracy and exact match
scoring.py    loss and answers of one model
schedule.py   all measurements, and what each needs
store.py      one JSON file per finished measurement
page.py       docs/results.md, from those files alone
"""
