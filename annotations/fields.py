"""Every field that is read from a json: its form and range, what it means, and what to do when it is wrong.

`FIELDS` is the only table. `record_reader` reads records through it, and docs/own_data.md prints it. A value in another
form that can mean one thing only is taken, with a warning; all else is a finding of one line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from annotations.forms import (
    AREA,
    BOX,
    COUNT,
    DETECTED_BOX,
    FILE_NAME,
    FLAG,
    ID,
    LINKS,
    NAME,
    NAMES,
    POINTS,
    SCORE,
    SEGMENTATION,
    SIDE,
    Form,
)


@dataclass(frozen=True)
class Field:
    """One entry of a record.

    Attributes:
        record: ``image``, ``object``, ``category`` or ``result``.
        name: The entry's key.
        form: What its value has to be.
        meaning: What it says, for the docs.
        remedy: What to do when it is wrong.
        default: What a missing entry and null mean, as a value.
        missing: The same in words; empty where the entry must be there.
        fallback: What is taken in place of a missing entry that must be there, in words; empty for nothing.
        part: Who needs it: "" for all, "segm" or "keypoints" for who learns or scores these, "none" for nobody. A
            broken value that is not needed is left out with a warning.
        own_name: What it is called in the json of a custom folder, one entry per box; "" where there is none.
    """

    record: str
    name: str
    form: Form
    meaning: str
    remedy: str
    default: Any = None
    missing: str = ""
    fallback: str = ""
    part: str = ""
    own_name: str = ""


_FIELDS = (
    Field("image", "id", ID, "names the picture in annotations and results", "give every image an id"),
    Field("image", "file_name", FILE_NAME, "the file, below the image folder", "name a file inside the image folder"),
    Field("image", "height", SIDE, "rows of the picture", "write the image's size", default=0),
    Field("image", "width", SIDE, "columns of the picture", "write the image's size", default=0),
    Field("category", "id", ID, "names the class in annotations and results", "give every category an id"),
    Field("category", "name", NAME, "the class", "give every category a name"),
    Field(
        "category", "keypoints", NAMES, "names of the keypoints", "name every keypoint once, or leave it out",
        missing="points have no names", part="keypoints",
    ),
    Field(
        "category", "skeleton", LINKS, "lines between keypoints, in drawings", "fix or remove it",
        missing="no lines are drawn", part="none",
    ),
    Field("object", "id", ID, "only that it occurs once", "fix it or leave it out", missing="none", part="none"),
    Field("object", "image_id", ID, "the picture that it is in", "fix the id or remove the entry"),
    Field("object", "category_id", ID, "its class", "fix the id or add the category"),
    Field(
        "object", "bbox", BOX, "x, y, width, height in pixels from the top left corner; corners x1, y1, x2, y2 in a "
        "custom json", "fix or remove the object", default=[0, 0, 0, 0],
        fallback="the box around its mask, with a warning; without one an error", own_name="bboxes",
    ),
    Field(
        "object", "area", AREA, "its size, for COCO's size ranges and OKS", "correct it or leave it out",
        default=math.nan, missing="pixels of its polygons, else of its box", own_name="area",
    ),
    Field(
        "object", "iscrowd", FLAG, "1: many objects, neither to be found nor wrong", "it is 0 or 1", default=0,
        missing="0", own_name="iscrowd",
    ),
    Field(
        "object", "segmentation", SEGMENTATION, "its mask", "fix or remove it",
        missing="no mask: an error where masks are used", part="segm", own_name="segmentations",
    ),
    Field(
        "object", "keypoints", POINTS, "its points; v is 0 (not labelled), 1 (hidden) or 2 (visible)",
        "v is 0 (not labelled), 1 (hidden) or 2 (visible)", missing="no point is labelled", part="keypoints",
        own_name="keypoints",
    ),
    Field(
        "object", "num_keypoints", COUNT, "how many points have v > 0; counted anew", "correct it or leave it out",
        missing="counted", part="none",
    ),
    Field("result", "image_id", ID, "the picture", "give the id that the ground truth has"),
    Field("result", "category_id", ID, "the class", "give the id that the ground truth has"),
    Field("result", "score", SCORE, "how sure the detector is", "give a finite number"),
    Field(
        "result", "bbox", DETECTED_BOX, "x, y, width, height in pixels", "give four finite numbers",
        missing="not scored for boxes", part="bbox",
    ),
    Field(
        "result", "segmentation", SEGMENTATION, "the mask",
        "give polygons, or run lengths as pycocotools writes them", missing="not scored for masks", part="segm",
    ),
    Field(
        "result", "keypoints", POINTS, "the points; v is not read", "give x, y, v for every point",
        missing="not scored for keypoints", part="keypoints",
    ),
)  # fmt: skip

FIELDS = {(field.record, field.name): field for field in _FIELDS}

_WHERE = {"image": "images[]", "object": "annotations[]", "category": "categories[]", "result": "results[]"}
_USERS = {
    "bbox": "boxes are scored",
    "segm": "masks are learnt or scored",
    "keypoints": "keypoints are learnt or scored",
}


def format_field_table() -> list[str]:
    """Return the table of all fields as lines of Markdown, for docs/own_data.md."""
    lines = [
        "| field | meaning | form | also taken, with a warning | missing or null | a wrong value |",
        "|---|---|---|---|---|---|",
    ]
    for field in _FIELDS:
        name = f"`{_WHERE[field.record]}.{field.name}`"
        if field.own_name:
            name += f", `{field.own_name}[]`"
        wrong = {"": "an error", "none": "a warning"}.get(field.part) or f"an error where {_USERS[field.part]}"
        wrong += f": {field.remedy}"
        cells = (
            name,
            field.meaning,
            field.form.expected,
            ", ".join(field.form.also),
            field.missing or field.fallback or "an error",
            wrong,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def is_used(field: Field, uses: Sequence[str]) -> bool:
    """Tell whether a command that learns or scores ``uses`` ("segm", "keypoints", for results "bbox") needs a field."""
    return field.part == "" or field.part in uses
