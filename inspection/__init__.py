"""A dataset looked over before training, for check_dataset.py.

Not here: the checks that training itself stops at (annotations).
Open first: ``diagnosis.py``.
"""
