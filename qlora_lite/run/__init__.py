"""One run: plan it, train it, load it, score it, merge it.

initialising.py  a recipe file for any model
planning.py      will it fit
folder.py        the run's folder: what it records, who may use it, whether it is finished
training.py      from recipe to adapter
finishing.py     samples, report and adapter at the end of training
loading.py       a run, an adapter or any model directory, ready to use
scoring.py       how well runs and models predict rows
speaking.py      a conversation with a run or a model
inspecting.py    what trained adapters look like: spectra, ranks, subspaces
deltas.py        the trained layers of a run, one at a time
pairs.py         the factors of PEFT adapters and loralib checkpoints
extracting.py    an adapter of another rank out of a run
merging.py       from run to merged model
proving.py       the measured proof that a merged model is the trained one
"""
