"""Image files and masks as arrays, and the geometry that moves them.

Owns: decoding, masks inside their boxes, which part of a picture a canvas shows, pictures whose transforms wait.
Not here: what objects a picture holds (annotations) and which augmentations exist (transforms.py, presets.py).
Open first: ``images.py``.
"""
