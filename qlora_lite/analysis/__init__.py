"""What an adapter learned: functions on its factors, its deltas and the weights of its base.

rank.py      singular values, effective rank, kept rank, gates
norms.py     norms of deltas relative to their weights
subspace.py  subspace similarity of two adapters (phi), and amplification
findings.py  the results as plain values
figures.py   the results as PNG files
loralib.py   read the factors of a loralib checkpoint
weights.py   read the weights of a base, one at a time
"""
