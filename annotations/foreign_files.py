"""What lies where an annotation or results file should be: no json, or the json of another tool."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files import describe_content

COCO = "a COCO annotation file"

_AS_COCO = "export the annotations as COCO from that tool"


def explain_undecodable(path: Path, start: int) -> tuple[str, str]:
    """Return (what a file is that is no UTF-8 text, what to do); ``start`` is the first byte that is none."""
    with path.open("rb") as file:
        head = file.read(4)
    known = describe_content(path)
    if known is None and head.startswith(b"PK"):
        known = "a checkpoint of torch"
    if known is None and head.startswith(b"\x80"):
        known = "pickled Python objects"
    if known is None or known.startswith("JSON"):
        return f"not UTF-8 text (byte {start})", "save the file as UTF-8"
    problem, _, remedy = known.partition("; ")
    return f"{problem}, expected json", remedy or "give the json file"


def explain_json_error(path: Path, text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    """Return (where and why a text is no json, what to do)."""
    place = f"not valid json at line {error.lineno} column {error.colno}"
    before, rest = text[max(0, error.pos - 100) : error.pos].rstrip(), text[error.pos : error.pos + 100].lstrip()
    known = describe_content(path)
    if known is not None and not known.startswith("JSON") and not rest.startswith(("//", "/*", "#")):
        problem, _, remedy = known.partition("; ")
        return f"{place}: {problem}", remedy or "give the json file"
    if error.msg == "Extra data" and rest.startswith(("{", "[")):
        return f"{place}: a second value, as in files with one json per line", "join the lines to one list, [..., ...]"
    if not rest or error.msg.startswith("Unterminated string"):
        return f"{place}: the text ends in the middle", "the file is cut off; copy or write it again"
    if rest.startswith(("}", "]")) and before.endswith(","):
        return f"{place}: a comma before {rest[0]!r}", "remove the comma"
    if error.msg.startswith("Illegal trailing comma"):
        return f"{place}: a comma before the end of a list or object", "remove the comma"
    if rest.startswith(("//", "/*", "#")):
        return f"{place}: json has no comments", "remove them"
    if rest.startswith(("'", "True", "False", "None", "array(", "nan")):
        return f"{place}: Python's way to print values", "write the file with json.dump, not with print or str"
    return f"{place}: {error.msg}", "correct the file"


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: all(key in record for key in keys)


# Of a dict, or of the first entry of a list: how it is told, what it is, what to do. The first that holds counts.
_OBJECTS: tuple[tuple[Callable[[dict[str, Any]], bool], str, str], ...] = (
    (_has("shapes", "imagePath"), "LabelMe's json of one picture", _AS_COCO + " (labelme2coco)"),
    (_has("_via_img_metadata"), "a project of the VGG Image Annotator (VIA)", _AS_COCO),
    (_has("samples"), "a dataset of FiftyOne", _AS_COCO + " (export with COCODetectionDataset)"),
    (_has("items", "categories"), "Datumaro's json", _AS_COCO),
    (_has("asset", "regions"), "VoTT's json", _AS_COCO),
    (_has("features", "type"), "GeoJSON", "write the objects as COCO, in pixels"),
    (_has("objects", "size"), "Supervisely's json of one picture", _AS_COCO),
    (_has("bboxes"), "the json of one picture of a custom folder", "--dataset custom reads folders of these"),
    (_has("images"), COCO, "give the file of results here, a list of {image_id, category_id, score, ...}"),
    (
        lambda record: any(isinstance(v, dict) and "regions" in v for v in record.values()),
        "annotations of the VGG Image Annotator (VIA)",
        _AS_COCO,
    ),
)
_LISTS: tuple[tuple[Callable[[dict[str, Any]], bool], str, str], ...] = (
    (_has("image_id", "score"), "a list of results, as detectors write them", "give the annotation file here"),
    (_has("data", "annotations"), "Label Studio's own json", _AS_COCO),
    (
        lambda record: "file_name" in record and isinstance(record.get("annotations"), list),
        "a list of pictures with their annotations, as Detectron2 registers them",
        "write it as COCO (convert_to_coco_json of detectron2)",
    ),
    (_has("image", "annotations"), "CreateML's json", _AS_COCO),
    (
        _has("image_id", "category_id"),
        "a list of annotations alone",
        "ground truth has it under 'annotations', beside 'images' and 'categories'; results have a 'score'",
    ),
)


def describe_json(content: Any) -> tuple[str, str] | None:
    """Return (what a json is by its keys, what to do), or None where that is not clear."""
    is_list = isinstance(content, list)
    record = content[0] if is_list and content else content
    if not isinstance(record, dict):
        return None
    for holds, what, remedy in _LISTS if is_list else _OBJECTS:
        if holds(record):
            return what, remedy
    return None
