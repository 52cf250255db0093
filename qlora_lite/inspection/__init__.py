"""What adapters learned, layer by layer: of runs, PEFT adapters and loralib checkpoints.

inspect.py           the function `inspect`, and its figures as files
layers.py            the numbers of one layer: ranks, norms, amplification, phi
deltas.py            what an adapter adds to each weight; the deltas of a run
foreign_adapters.py  the deltas of PEFT adapters and loralib checkpoints
"""
