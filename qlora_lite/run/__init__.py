"""One run: plan it, train it, load it, score it, merge it.

initialising.py  write a recipe file for any model
setup.py         device, base facts, method and adapter plan of a recipe, read once per command
planning.py      the memory plan, and checks of settings that depend on each other
savings.py       settings that need less memory, for a recipe that does not fit
computing.py     the device rule of a run: chosen at its start, and recorded
folder.py        the run's folder: what it records, who may use it, whether it is finished
changes.py       how a recipe differs from the recorded one
training.py      from recipe to adapter
job.py           what the training loop works with: batches, optimizer, engine, scorer
tracking.py      metrics for experiment trackers
finishing.py     samples, report and adapter files at the end of training
loading.py       load a run or any model directory
scoring.py       held-out loss, accuracy and perplexity of runs and models
chat.py          load a model for `generate`, or chat with it
extracting.py    cut a run's adapter to another rank
merging.py       from run to merged model
merge_check.py   compare the merged model with the trained one
"""
