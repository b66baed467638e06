"""A COCO file's pictures and objects written anew in YOLO's and Pascal VOC's layouts."""

import json
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml

from annotations.findings import Findings
from annotations.record_checks import Rules
from coco_eval import CocoEvaluator
from coco_utils import annotations_from_records
from helpers.near_truth import near_truth


def plain_coco(content, *, crowds=True):
    """Return COCO's dicts with what all formats can say: classes in the order of names, no areas, a class that occurs."""
    used = {record["category_id"] for record in content["annotations"]}
    categories = sorted((c for c in content["categories"] if c["id"] in used), key=lambda c: c["name"])
    number = {category["id"]: k + 1 for k, category in enumerate(categories)}
    objects = [
        {**{k: v for k, v in record.items() if k not in ("area", "id")}, "category_id": number[record["category_id"]]}
        for record in content["annotations"]
        if crowds or not record.get("iscrowd")
    ]
    images = sorted(content["images"], key=lambda image: image["file_name"])
    return {"images": images, "annotations": objects, "categories": [{**c, "id": number[c["id"]]} for c in categories]}


def by_image(content):
    """Return (image, its objects) of every image."""
    objects = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        objects[record["image_id"]].append(record)
    return [(image, objects[image["id"]]) for image in content["images"]]


def yolo_row(record, width, height, rows="boxes"):
    """Return a row of a label file; all digits are written."""
    size, numbers = (width, height), []
    x, y, w, h = record["bbox"]
    if rows == "outlines":
        numbers = [v / size[k % 2] for k, v in enumerate(record["segmentation"][0])]
    else:
        numbers = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
    if rows == "points":
        numbers += [v / (*size, 1)[k % 3] for k, v in enumerate(record["keypoints"])]
    return " ".join([str(record["category_id"] - 1), *map(repr, map(float, numbers))])


def write_yolo(root, splits, *, rows="boxes", info=None):
    """Write {role: (COCO's dicts, folder of the pictures)}; pictures without objects get no label file."""
    names = [c["name"] for c in splits["train"][0]["categories"]]
    for role, (content, pictures) in splits.items():
        for folder in ("images", "labels"):
            (root / folder / role).mkdir(parents=True, exist_ok=True)
        for image, objects in by_image(content):
            name = Path(image["file_name"]).name
            shutil.copyfile(Path(pictures, image["file_name"]), root / "images" / role / name)
            lines = [yolo_row(record, image["width"], image["height"], rows) for record in objects]
            if lines:
                (root / "labels" / role / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    content = {
        "path": ".",
        "train": "images/train",
        "val": "images/val",
        "names": dict(enumerate(names)),
        **(info or {}),
    }
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root / "data.yaml"


def voc_xml(image, objects, names):
    """Return the xml of one picture; a crowd is difficult."""
    lines = [
        f"<annotation><filename>{escape(image['file_name'])}</filename>",
        f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>",
    ]
    for record in objects:
        x, y, w, h = record["bbox"]
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h))
        box = "".join(f"<{name}>{value!r}</{name}>" for name, value in corners)
        lines.append(
            f"<object><name>{escape(names[record['category_id']])}</name><difficult>{record.get('iscrowd', 0)}"
            f"</difficult><bndbox>{box}</bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        )
    return "\n".join([*lines, "</annotation>"])


def write_voc(root, splits, lists=("train", "val")):
    """Write {role: (COCO's dicts, folder of the pictures)}."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for (content, pictures), name in zip(splits.values(), lists):
        category_names = {c["id"]: c["name"] for c in content["categories"]}
        stems = []
        for image, objects in by_image(content):
            stems.append(f"{name}_{Path(image['file_name']).stem}")
            suffix = Path(image["file_name"]).suffix
            shutil.copyfile(Path(pictures, image["file_name"]), root / "JPEGImages" / (stems[-1] + suffix))
            (root / "Annotations" / f"{stems[-1]}.xml").write_text(voc_xml(image, objects, category_names))
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
    return root


def read_splits(root, kind="instances", **options):
    """Return {role: (plain COCO dicts, folder of the pictures)} of a dataset in COCO's layout."""
    splits = {}
    for role in ("train", "val"):
        content = json.loads((root / "annotations" / f"{kind}_{role}2017.json").read_text())
        splits[role] = plain_coco(content, **options), root / f"{role}2017"
    return splits


def same_classes(splits):
    """Give all splits the classes of all of them, numbered alike in the order of names."""
    names = sorted({c["name"] for content, _ in splits.values() for c in content["categories"]})
    number = {name: k + 1 for k, name in enumerate(names)}
    for content, _ in splits.values():
        old = {c["id"]: number[c["name"]] for c in content["categories"]}
        for record in content["annotations"]:
            record["category_id"] = old[record["category_id"]]
        first = content["categories"][0]
        content["categories"] = [{**first, "id": k, "name": name} for name, k in number.items()]
    return splits


def annotations_of(content):
    """Return COCO's dicts as annotations."""
    rules = Rules("coco", str, str)
    images, objects, categories = content["images"], content["annotations"], content["categories"]
    return annotations_from_records(images, objects, categories, rules, Findings())


def figures(annotations, iou_type, sigmas=None):
    """Return all figures of detections near the objects; the detections are a function of seed and position."""
    evaluator = CocoEvaluator(annotations, [iou_type], sigmas=sigmas)
    for i in range(len(annotations)):
        evaluator.add(int(annotations.image_ids[i]), near_truth(annotations, i, np.random.default_rng(i), 2.0))
    result = evaluator.compute()
    return result.metrics, result.per_class
