"""Boxes, masks, keypoints and captions drawn into pictures, sheets of pictures, and a page of them for a browser.

Not here: what is drawn for whom (report, inspection, predict.py).
Open first: ``pictures.py``; of the page ``viewer.py``.
"""
