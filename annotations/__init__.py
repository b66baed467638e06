"""What a dataset says, checked, in flat arrays.

Owns: the arrays of a split and their cache, the checks of records and image files, skeletons, labels.
Not here: the readers of formats (coco_utils.py, custom_dataset.py, others in loading), the choice of splits (loading).
Open first: ``arrays.py``.
"""
