"""The detectors: built from a plain record, loaded with weights, sped up.

Not here: what a model's output becomes afterwards (evaluation).
Open first: ``architectures.py``.
"""
