"""Data that the benchmarks draw themselves: photographs-like JPEGs with polygons, annotations of any size."""

import json

import numpy as np
from PIL import Image

CATEGORIES = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(80)]


def draw_photographs(folder, images=200, objects=7, vertices=25, height=480, width=640):
    """Write JPEGs of ``width`` x ``height`` and their COCO json below ``folder``; returns (images folder, json)."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    records, annotations = [], []
    for i in range(images):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grainy = (smooth + rng.normal(0, 12, (height, width, 1))).clip(0, 255).astype(np.uint8)
        name = f"{i:012d}.jpg"
        Image.fromarray(grainy).save(folder / name, quality=90)
        records.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        for _ in range(objects):
            outline = _outline(rng, vertices, height, width)
            x1, y1, x2, y2 = *outline.min(axis=0), *outline.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": int(rng.integers(1, 81)),
                    "bbox": [float(v) for v in np.round([x1, y1, x2 - x1, y2 - y1], 2)],
                    "area": float(np.round((x2 - x1) * (y2 - y1) * 0.6, 2)),
                    "iscrowd": 0,
                    "segmentation": [np.round(outline, 2).reshape(-1).tolist()],
                }
            )
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": CATEGORIES}))
    return folder, path


def _outline(rng, vertices, height, width):
    """A wobbly closed outline inside the image, [vertices, 2]."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, vertices))
    radius = np.exp(rng.uniform(np.log(15), np.log(150))) * rng.uniform(0.7, 1.0, vertices)
    centre = rng.uniform((30, 30), (width - 30, height - 30))
    points = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points.clip((0, 0), (width, height))
