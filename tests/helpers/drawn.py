"""Drawn datasets: COCO's layout, and a folder with one json each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]


def draw_coco(root, num_images=6, *, sizes=((60, 80), (80, 60), (64, 64)), num_keypoints=0, seed=0):
    """Write a dataset in COCO's layout; every image has objects, one object is a crowd."""
    rng = np.random.default_rng(seed)
    kind = "person_keypoints" if num_keypoints else "instances"
    names = ["person"] if num_keypoints else ["person", "bicycle", "car"]
    for role in ("train", "val"):
        folder = root / f"{role}2017"
        folder.mkdir(parents=True, exist_ok=True)
        images, objects = [], []
        for i in range(num_images):
            height, width = sizes[i % len(sizes)]
            image = Image.new("RGB", (width, height), tuple(rng.integers(0, 100, 3).tolist()))
            draw = ImageDraw.Draw(image)
            for k in range(int(rng.integers(1, 4))):
                w, h = rng.integers(12, 30, 2)
                x, y = rng.integers(0, width - w), rng.integers(0, height - h)
                draw.rectangle((x, y, x + w - 1, y + h - 1), fill=tuple(rng.integers(150, 255, 3).tolist()))
                record = {
                    "id": len(objects) + 1,
                    "image_id": 10 + i,
                    "category_id": int(rng.integers(1, len(names) + 1)),
                    "bbox": [int(x), int(y), int(w), int(h)],
                    "area": int(w * h),
                    "iscrowd": 0,
                    "segmentation": [[int(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]],
                }
                if num_keypoints:
                    points = np.stack(
                        [rng.integers(x, x + w, num_keypoints), rng.integers(y, y + h, num_keypoints)], axis=1
                    )
                    record["keypoints"] = [int(v) for px, py in points for v in (px, py, 2)]
                    record["num_keypoints"] = num_keypoints
                if i == 0 and k == 0 and not num_keypoints:
                    record["iscrowd"] = 1
                    counts = [0, height * width // 2, height * width - height * width // 2]
                    record["segmentation"] = {"size": [height, width], "counts": counts}
                objects.append(record)
            name = f"{i:06d}.png"
            image.save(folder / name)
            images.append({"id": 10 + i, "file_name": name, "height": height, "width": width})
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
        if num_keypoints == 17:
            from annotations.skeleton import COCO_PERSON_KEYPOINTS

            categories[0].update(keypoints=list(COCO_PERSON_KEYPOINTS), skeleton=[[1, 2], [1, 3]])
        path = root / "annotations" / f"{kind}_{role}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return root


def draw_folder(root, num_images=6, *, num_keypoints=2, classes=None, polygons=False, size=(60, 80), info=None):
    """Write a custom dataset of bright rectangles; the last image of each split is empty background."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "annotations").mkdir()
        for i in range(num_images):
            height, width = size
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            entry = {"bboxes": [], "labels": [], "keypoints": [], "segmentations": []}
            for _ in range(0 if i == num_images - 1 else int(rng.integers(1, 3))):
                w, h = (int(v) for v in rng.integers(14, 30, 2))
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                pixels[y : y + h, x : x + w] = rng.integers(150, 255, 3)
                entry["bboxes"].append([x, y, x + w, y + h])
                entry["labels"].append(str(rng.choice(classes or ["object"])))
                places = np.stack([rng.integers(x, x + w, num_keypoints), rng.integers(y, y + h, num_keypoints)], 1)
                entry["keypoints"].append([[int(a), int(b), 2] for a, b in places])
                entry["segmentations"].append([[x, y, x + w, y, x + w, y + h, x, y + h]])
            keep = {"bboxes"} | ({"labels"} if classes else set()) | ({"keypoints"} if num_keypoints else set())
            keep |= {"segmentations"} if polygons else set()
            Image.fromarray(pixels).save(root / split / "images" / f"im_{i:03d}.png")
            path = root / split / "annotations" / f"im_{i:03d}.json"
            path.write_text(json.dumps({k: v for k, v in entry.items() if k in keep}))
    if info is not None:
        (root / "dataset.json").write_text(json.dumps(info))
    return root


def edit(root, change, split="train", index=0):
    path = root / split / "annotations" / f"im_{index:03d}.json"
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))
