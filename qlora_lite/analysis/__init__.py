"""Look at what an adapter learned: functions on its factors, its deltas and the weights under them.

rank.py      singular values, effective rank, kept rank, gates
norms.py     how large the delta is beside its weight
subspace.py  how far two adapters share directions (phi), and what a delta amplifies
findings.py  all of these as plain values
figures.py   the values as PNG files
loralib.py   the factors of a loralib checkpoint
weights.py   the weights of a base, one at a time
"""
