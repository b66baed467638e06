"""What a run is made of: its plan, its state, one evaluation, and the proof that it can be resumed.

The epochs themselves are a loop in train.py.
Not here: the step, which is in engine.py.
Open first: ``state.py``.
"""
