"""A trained detector in use, without any training code.

Not here: the commands, which are predict.py and export.py.
Open first: ``detector.py``, whose first lines are the interface for Python and notebooks.
"""
