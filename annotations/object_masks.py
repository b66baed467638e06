"""The masks of objects, from the segmentations that the arrays of a split hold."""

from typing import Any

from annotations.arrays import Annotations
from pixels.masks import MaskBlock, block_from_polygons, block_from_rle, rle_from_polygons


def mask_block(annotations: Annotations, i: int, n: int) -> MaskBlock:
    """Return the mask of object ``n`` of image ``i``; an object without a segmentation has an empty one."""
    height, width = int(annotations.heights[i]), int(annotations.widths[i])
    counts = annotations.rle(n)
    if counts:
        return block_from_rle(counts, height, width)
    return block_from_polygons(annotations.polygons(n), height, width)


def mask_rle(annotations: Annotations, i: int, n: int) -> dict[str, Any]:
    """Return the mask of object ``n`` of image ``i`` as COCO's run lengths, as ``annToRLE`` of pycocotools."""
    height, width = int(annotations.heights[i]), int(annotations.widths[i])
    counts = annotations.rle(n)
    if counts:
        return {"size": [height, width], "counts": counts}
    return rle_from_polygons(annotations.polygons(n), height, width)
