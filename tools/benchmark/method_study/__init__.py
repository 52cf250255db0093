"""The study of all methods: what is trained, what is measured, and what it says about the papers.

contenders.py  every method of the catalogue at one budget, and the runs that claims add
material.py    the data sets
budget.py      what every run gets: base, rank, steps, tokens
results.py     results.jsonl: what is measured once is not measured again
training.py    one run, and what is kept of it
rates.py       the learning rate of a method: the best of three
cost.py        seconds a step beside LoRA, and the tensors' bytes
ranks.py       a trained adapter cut to lower ranks
schedule.py    everything that has to be measured, in order
readings.py    the results as claims, tables and figures ask for them
verdict.py     when a difference counts
claims.py      what each paper says, in numbers of this study
figures.py     the pictures
page.py        the table and the findings in docs/methods.md
record.py      everything as one JSON file
"""
