"""The comparison of all methods: what is trained and measured, and the claims of the papers.

contenders.py  every method of the catalogue at one budget, and extra runs for some claims
material.py    the data sets
budget.py      what all runs share: base, rank, steps, tokens
results.py     results.jsonl, so that nothing is measured twice
training.py    one run and its measurements
rates.py       the learning rate of a method: the best of three
cost.py        seconds per step relative to LoRA, and bytes of tensors
ranks.py       a trained adapter truncated to lower ranks
schedule.py    all measurements, in order
readings.py    the results by method and data set
comparable.py  when runs may be compared
verdict.py     when a difference is significant
claims.py      the claims of the papers as tests on the results
figures.py     the figures
page.py        the table and the findings in docs/methods.md
record.py      everything as one JSON file
"""
