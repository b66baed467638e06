"""An embedded dataset: shapes drawn on the fly, with boxes, masks and keypoints, deterministic by index.

``--dataset shapes`` needs no download, trains all models, and shows within minutes whether a machine learns.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from annotations.arrays import Annotations
from annotations.findings import Findings
from annotations.record_checks import Rules
from coco_utils import annotations_from_records
from utils import seeded_numpy_rng

CATEGORIES = ("disc", "square", "triangle")
KEYPOINT_NAMES = ("top", "left", "right")
SKELETON = ((0, 1), (0, 2), (1, 2))

# (height, width) of the drawn images: several aspect-ratio groups.
SIZES = ((160, 160), (120, 192), (192, 120), (128, 256), (144, 176))
NUM_IMAGES = {"train": 480, "val": 120}

# Pixels between the boxes of two shapes.
GAP = 2.0


@dataclass(frozen=True)
class ShapeDrawer:
    """Draws the images that `shapes_annotations` describes."""

    split: str

    def read(self, annotations: Annotations, index: int) -> np.ndarray:
        """Draw image ``index``, uint8 [H, W, 3]: bright shapes on a dim gradient, with noise."""
        rng = seeded_numpy_rng("shapes", self.split, "pixels", index)
        height, width = int(annotations.heights[index]), int(annotations.widths[index])
        corners = rng.uniform(20, 110, (2, 2, 3)).astype(np.float32)
        rows = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        columns = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
        top = corners[0, 0] * (1 - columns) + corners[0, 1] * columns
        bottom = corners[1, 0] * (1 - columns) + corners[1, 1] * columns
        canvas = Image.fromarray((top * (1 - rows) + bottom * rows).astype(np.uint8))
        draw = ImageDraw.Draw(canvas)
        objects = annotations.objects(index)
        for n in range(objects.start, objects.stop):
            colour = tuple(int(c) for c in rng.uniform(140, 255, 3))
            points = annotations.polygons(n)[0]
            draw.polygon(list(map(tuple, points.reshape(-1, 2).tolist())), fill=colour)
        noise = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
        return (np.asarray(canvas).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)


def shapes_annotations(split: str, num_images: int | None = None) -> Annotations:
    """Return the annotations of the ``train`` or ``val`` images; every twentieth image is empty background."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(NUM_IMAGES[split] if num_images is None else num_images):
        rng = seeded_numpy_rng("shapes", split, "layout", index)
        height, width = SIZES[int(rng.integers(len(SIZES)))]
        images.append({"id": index + 1, "file_name": f"{split}-{index}", "height": height, "width": width})
        boxes: list[list[float]] = []
        for _ in range(0 if index % 20 == 19 else int(rng.integers(1, 6))):
            record = _place_shape(rng, height, width, boxes)
            if record is not None:
                boxes.append(record["bbox"])
                objects.append({"image_id": index + 1, **record})
    categories = [
        {
            "id": i + 1,
            "name": name,
            "keypoints": list(KEYPOINT_NAMES),
            "skeleton": [[a + 1, b + 1] for a, b in SKELETON],
        }
        for i, name in enumerate(CATEGORIES)
    ]
    place = f"shapes ({split})"
    rules = Rules(place, lambda i: f"{place}: image {i}", lambda n: f"{place}: object {n}")
    return annotations_from_records(images, objects, categories, rules, Findings())


def _place_shape(rng: np.random.Generator, height: int, width: int, taken: list[list[float]]) -> dict[str, Any] | None:
    """Draw a shape of random class, size and turn where it touches none of ``taken``; None after ten tries."""
    for _ in range(10):
        label = int(rng.integers(len(CATEGORIES)))
        radius = rng.uniform(0.12, 0.3) * min(height, width)
        centre = rng.uniform((radius, radius), (width - radius, height - radius))
        angle = 0.0 if CATEGORIES[label] == "disc" else math.radians(rng.uniform(-25, 25))
        outline, keypoints = _outline(CATEGORIES[label])
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = centre + radius * outline @ turn.T
        low, high = points.min(axis=0), points.max(axis=0)
        box = [*low.tolist(), *(high - low).tolist()]
        if all(_apart(box, other) for other in taken):
            placed = np.clip(np.floor(centre + radius * keypoints @ turn.T), 0, (width - 1, height - 1))
            return {
                "category_id": label + 1,
                "bbox": box,
                "segmentation": [points.reshape(-1).tolist()],
                "keypoints": np.concatenate([placed, np.full((3, 1), 2.0)], axis=1).reshape(-1).tolist(),
            }
    return None


def _apart(a: list[float], b: list[float]) -> bool:
    """Tell whether two xywh boxes are at least `GAP` pixels apart."""
    return a[0] + a[2] + GAP < b[0] or b[0] + b[2] + GAP < a[0] or a[1] + a[3] + GAP < b[1] or b[1] + b[3] + GAP < a[1]


def _outline(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (outline [P, 2], keypoints top, left and right [3, 2]) of a shape of radius 1 around the origin."""
    if name == "disc":
        turns = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        outline = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        return outline, np.array([[0, -0.9], [-0.9, 0], [0.9, 0]])
    if name == "square":
        side = math.sqrt(0.5)
        outline = side * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
        return outline, side * np.array([[0, -0.9], [-0.9, 0], [0.9, 0]])
    outline = np.array([[math.sin(t), -math.cos(t)] for t in (0, 2 * math.pi / 3, -2 * math.pi / 3)])
    return outline, 0.85 * outline[[0, 2, 1]]
