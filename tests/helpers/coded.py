"""Images that code the coordinates of their pixels, with objects, masks and keypoints."""

import numpy as np
from torchvision.transforms import v2

from annotations.findings import Findings
from annotations.labels import LabelMap
from annotations.record_checks import Rules
from coco_utils import annotations_from_records
from loading.samples import DetectionDataset
from presets import build_transforms


def coded_annotations(num_images=3, num_keypoints=4):
    """Objects with polygons and keypoints on images that `CodedImages` draws."""
    rng = np.random.default_rng(3)
    images, objects = [], []
    for i in range(num_images):
        height, width = ((120, 160), (160, 110), (100, 100))[i % 3]
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": height, "width": width})
        for _ in range(5):
            w, h = rng.integers(15, 60, 2)
            x, y = rng.integers(0, (width - w, height - h))
            outline = np.array([[x, y + h / 2], [x + w / 2, y], [x + w, y + h / 2], [x + w / 2, y + h]])
            points = np.stack([rng.integers(x, x + w, num_keypoints), rng.integers(y, y + h, num_keypoints)], axis=1)
            record = {"image_id": i + 1, "category_id": 1, "bbox": [int(x), int(y), int(w), int(h)]}
            record["segmentation"] = [outline.reshape(-1).tolist()]
            record["keypoints"] = [int(v) for px, py in points for v in (px, py, rng.integers(1, 3))]
            objects.append(record)
    rules = Rules("coded", lambda i: f"image {i}", lambda n: f"object {n}")
    return annotations_from_records(images, objects, [{"id": 1, "name": "thing"}], rules, Findings())


class CodedImages:
    """Images whose red and green say which column and row a pixel came from."""

    def read(self, annotations, index):
        height, width = int(annotations.heights[index]), int(annotations.widths[index])
        pixels = np.full((height, width, 3), 255, dtype=np.uint8)
        pixels[:, :, 0] = np.arange(width)
        pixels[:, :, 1] = np.arange(height)[:, None]
        return pixels


def coded_dataset(transforms, **options):
    annotations = coded_annotations()
    return DetectionDataset(
        annotations,
        CodedImages(),
        LabelMap((1,), ("thing",)),
        transforms=transforms,
        needs_masks=True,
        needs_keypoints=True,
        flip_order=np.array([1, 0, 3, 2]),
        **options,
    )


def without_colours(preset, **options):
    """The preset's geometry: colours must stay readable as coordinates."""
    steps = build_transforms(preset, **options).transforms
    return v2.Compose([step for step in steps if not isinstance(step, v2.RandomPhotometricDistort)])
