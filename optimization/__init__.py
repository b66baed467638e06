"""How weights move: the step, parameter groups and updates, schedule, precision, running average.

Not here: the loop over an epoch's steps, which is in engine.py.
Open first: ``optimizer.py``.
"""
