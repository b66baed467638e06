"""What a person looks at afterwards: files of an evaluation, curves, pictures, the page of a run.

Not here: the figures themselves (evaluation).
Open first: ``page.py``.
"""
