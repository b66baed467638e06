"""A run from its plan to its last epoch.

Owns: the state that a checkpoint restores, an epoch with its checkpoints, one evaluation, the plan, the resume proof.
Not here: the step, which is in engine.py.
Open first: ``epochs.py``.
"""
