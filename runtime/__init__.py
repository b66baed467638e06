"""A run on a machine: what it saves and says, and how it ends.

Owns: checkpoints, the run's folder, the log of an epoch, signals, what a machine allows.
Not here: processes and collectives, which are in utils.py.
Open first: ``checkpoint.py``.
"""
