"""Data that the benchmarks draw themselves: photographs-like JPEGs with polygons, annotations of any size, batches."""

import json

import numpy as np
import torch
from PIL import Image

from annotations.arrays import Annotations, join_bytes
from models.object_block import BatchTargets, objects_of

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


def draw_annotations(images, objects, classes, keypoints=0, height=480, width=640, vertices=0):
    """Return `Annotations` with ``objects`` in each picture, and a polygon for each where there are ``vertices``."""
    rng, total = np.random.default_rng(0), images * objects
    boxes = np.concatenate(
        [rng.uniform(0, (width - 130, height - 130), (total, 2)), rng.uniform(5, 120, (total, 2))], 1
    )
    boxes = boxes.round(2)
    corners, sides = boxes[:, None, :2], boxes[:, None, 2:]
    points = np.zeros((total, keypoints, 3))
    points[..., :2] = (corners + rng.random((total, keypoints, 2)) * sides).round(1)
    points[..., 2] = 2
    angles = np.linspace(0, 2 * np.pi, vertices, endpoint=False)[:, None]
    outlines = corners + sides / 2 * (1 + np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    names, starts = join_bytes([b"%09d.jpg" % i for i in range(images)])
    polygons = np.arange(total + 1) if vertices else np.zeros(total + 1, dtype=np.int64)
    return Annotations(
        image_ids=np.arange(1, images + 1),
        heights=np.full(images, height, dtype=np.int32),
        widths=np.full(images, width, dtype=np.int32),
        name_bytes=names,
        name_starts=starts,
        object_starts=np.arange(images + 1) * objects,
        boxes_xywh=boxes,
        category_ids=np.arange(total) % classes + 1,
        areas=boxes[:, 2] * boxes[:, 3],
        is_crowd=np.zeros(total, dtype=bool),
        keypoints=points,
        polygon_points=outlines.reshape(-1),
        polygon_starts=np.arange(polygons[-1] + 1) * 2 * vertices,
        object_polygons=polygons,
        rle_bytes=np.zeros(0, dtype=np.uint8),
        rle_starts=np.zeros(total + 1, dtype=np.int64),
        categories=tuple((k + 1, f"class {k + 1}") for k in range(classes)),
        keypoint_names=tuple(f"point {k + 1}" for k in range(keypoints)),
        has_segmentations=vertices > 0,
    )


def draw_batch(task, images, size, objects=7, num_classes=91, num_keypoints=17, seed=0):
    """Return pictures of noise, float [3, H, W], and as many objects in each, as the loader gives them."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    pictures = [torch.rand((3, height, width), generator=rng) for _ in range(images)]
    targets = []
    for i in range(images):
        corners = torch.rand((objects, 2, 2), generator=rng).sort(dim=1).values * torch.tensor([width - 2, height - 2])
        boxes = corners.reshape(objects, 4)
        boxes[:, 2:] += 2
        labels = torch.randint(1, num_classes, (objects,), generator=rng)
        target = {"image_id": i, "boxes": boxes, "labels": labels}
        if task == "mask":
            y, x = torch.arange(height)[:, None], torch.arange(width)
            x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
            target["masks"] = ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).to(torch.uint8)
        if task == "keypoint":
            places = torch.rand((objects, num_keypoints, 2), generator=rng)
            places = boxes[:, None, :2] + places * (boxes[:, None, 2:] - boxes[:, None, :2])
            target["keypoints"] = torch.cat([places, torch.ones(objects, num_keypoints, 1)], dim=2)
        targets.append(target)
    return pictures, BatchTargets(targets, objects_of(targets))


def coco_size_json(path, images=118_000, objects=7, vertices=25):
    """Write a COCO json of train2017's size (some 450 MB) without holding it in memory; polygons of 25 vertices."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"images": [')
        for i in range(images):
            height, width = ((480, 640), (640, 480), (427, 640))[i % 3]
            image = {"id": i + 1, "file_name": f"{i:012d}.jpg", "height": height, "width": width}
            file.write(("," if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(images):
            corner = rng.uniform(0, 300, (objects, 2)).round(2)
            size = rng.uniform(5, 120, (objects, 2)).round(2)
            outlines = (corner[:, None] + rng.random((objects, vertices, 2)) * size[:, None]).round(2)
            labels = rng.integers(1, 81, objects).tolist()
            parts = []
            for k in range(objects):
                record = {
                    "segmentation": [outlines[k].reshape(-1).tolist()],
                    "area": round(float(size[k].prod()) * 0.6, 4),
                    "iscrowd": 0,
                    "image_id": i + 1,
                    "bbox": [*corner[k].tolist(), *size[k].tolist()],
                    "category_id": labels[k],
                    "id": i * objects + k + 1,
                }
                parts.append(json.dumps(record))
            file.write(("," if i else "") + ",".join(parts))
        file.write('], "categories": ' + json.dumps(CATEGORIES) + "}")
