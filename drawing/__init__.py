"""Boxes, masks, keypoints and captions drawn into pictures, and sheets of pictures.

Not here: what is drawn for whom (report, inspection, predict.py).
Open first: ``pictures.py``.
"""
