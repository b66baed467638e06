"""What a run is made of: its plan, its state, one evaluation, and the proof that it can be resumed.

The epochs themselves are a loop in train.py.
Not here: the loop over an epoch's steps, which is in engine.py, and the step, in optimization/step.py.
Open first: ``state.py``.
"""
