"""From a dataset to batches on the device.

Owns: the two splits of a run, samples, collation, shared memory, loaders.
Not here: which images form a batch, which is group_by_aspect_ratio.py.
Open first: ``splits.py``.
"""
