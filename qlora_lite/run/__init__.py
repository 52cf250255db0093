"""One run: plan it, train it, load it, score it, merge it.

folder.py     the run's folder: what it records, who may use it, whether it is finished
planning.py   will it fit
training.py   from recipe to adapter
loading.py    a run, an adapter or any model directory, ready to use
scoring.py    perplexity on a data file
merging.py    from run to merged, verified model
"""
