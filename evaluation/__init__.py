"""From detections to matches, figures and their intervals.

Not here: the evaluator that puts these together, which is coco_eval.py, and pictures of results (report).
Open first: ``coco_matching.py``.
"""
