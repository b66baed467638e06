"""The worst and the best images of an evaluation as ``report.html`` shows them, in a file of the evaluation's folder.

The page is made anew from the files of its run, so pictures, objects and detections are kept, not the page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from annotations.arrays import Annotations
from annotations.skeleton import Skeleton
from drawing.pictures import Drawn
from drawing.viewer import ViewerSettings, embedded_jpeg, to_json, viewer_fragment, viewer_picture

# Detections go down to this score, or to the threshold where that is lower; of a picture so many at most.
LOWEST_SCORE = 0.05
MAX_SHOWN = 100

VIEWER = "pictures.json"
GROUPS = {"worst": "Worst images", "best": "Best images"}


@dataclass(frozen=True)
class Example:
    """One picture in the folder of an evaluation, and what it shows.

    Attributes:
        picture: Name of the picture file.
        sort: "worst" or "best".
        image_id: The image's id in the annotations.
        file_name: The image's file as the annotations name it.
        objects: Number of objects.
        detections: Number of detections that count.
        hits: Objects found.
        f1: At IoU 0.5 and the score threshold.
    """

    picture: str
    sort: str
    image_id: int | str
    file_name: str
    objects: int
    detections: int
    hits: int
    f1: float


def viewer_example(example: Example, pixels: np.ndarray, truth: Drawn, found: Drawn, scores: np.ndarray) -> str:
    """Return what the page shows of one image.

    Args:
        example: Its figures.
        pixels: uint8 [H, W, 3].
        truth: As annotated.
        found: Detections, in falling order of scores.
        scores: float [N], in 0..1.
    """
    note = f"F1 {example.f1:.2f}: {example.hits} of {example.objects} object(s) found"
    note += f" with {example.detections} detection(s)"
    size = (pixels.shape[0], pixels.shape[1])
    source = embedded_jpeg(pixels)
    group = GROUPS[example.sort]
    return viewer_picture(source, example.file_name, size, found, scores, truth=truth, group=group, note=note)


def write_viewer(
    folder: Path, annotations: Annotations, skeleton: Skeleton, score_threshold: float, pictures: Sequence[str]
) -> None:
    """Write what the page shows of an evaluation's images.

    Args:
        folder: The evaluation's.
        annotations: Knows the classes.
        skeleton: Which keypoints are joined.
        score_threshold: Where the slider starts.
        pictures: From `viewer_example`, those of a group one after another.
    """
    head = {"classes": annotations.categories, "links": skeleton.links, "score_threshold": score_threshold}
    text = json.dumps(head)[:-1] + ', "pictures": [\n' + ",\n".join(pictures) + "]}\n"
    (folder / VIEWER).write_text(text)


def read_viewer(folder: Path) -> str:
    """Return the HTML that shows an evaluation's images; empty where there are none, or those of an older version."""
    path = folder / VIEWER
    content = json.loads(path.read_text()) if path.is_file() else {"pictures": []}
    if not content["pictures"]:
        return ""
    threshold = content["score_threshold"]
    lowest = min(LOWEST_SCORE, threshold)
    note = f"The slider starts at the best F1 over all classes, {threshold:.3f}. Detections go down to {lowest:.3g}, "
    note += f"{MAX_SHOWN} of a picture at most."
    settings = ViewerSettings(dict(content["classes"]), content["links"], lowest, threshold, note)
    return viewer_fragment(settings, [to_json(picture) for picture in content["pictures"]])
