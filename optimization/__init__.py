"""How weights move: parameter groups and updates, schedule, precision, running average.

Not here: the step itself, which is in engine.py.
Open first: ``optimizer.py``.
"""
