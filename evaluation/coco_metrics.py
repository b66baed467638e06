"""The kinds of score, COCO's parameters and summary figures.

pycocotools' ``Params`` says what the figures are computed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import Params

from evaluation.coco_matching import Curves

# Name, array, IoU threshold or None for the mean over all, area range, position in max_dets.
SummaryLine = tuple[str, str, float | None, str, int]

DETECTION_SUMMARY: tuple[SummaryLine, ...] = (
    ("AP", "precision", None, "all", -1),
    ("AP50", "precision", 0.5, "all", -1),
    ("AP75", "precision", 0.75, "all", -1),
    ("AP_small", "precision", None, "small", -1),
    ("AP_medium", "precision", None, "medium", -1),
    ("AP_large", "precision", None, "large", -1),
    ("AR_1", "recall", None, "all", 0),
    ("AR_10", "recall", None, "all", 1),
    ("AR", "recall", None, "all", -1),
    ("AR_small", "recall", None, "small", -1),
    ("AR_medium", "recall", None, "medium", -1),
    ("AR_large", "recall", None, "large", -1),
)
KEYPOINT_SUMMARY: tuple[SummaryLine, ...] = (
    ("AP", "precision", None, "all", -1),
    ("AP50", "precision", 0.5, "all", -1),
    ("AP75", "precision", 0.75, "all", -1),
    ("AP_medium", "precision", None, "medium", -1),
    ("AP_large", "precision", None, "large", -1),
    ("AR", "recall", None, "all", -1),
    ("AR50", "recall", 0.5, "all", -1),
    ("AR75", "recall", 0.75, "all", -1),
    ("AR_medium", "recall", None, "medium", -1),
    ("AR_large", "recall", None, "large", -1),
)


@dataclass(frozen=True)
class ScoreKind:
    """One of COCO's kinds of score.

    Attributes:
        title: What is scored, for people.
        field: Key of a COCO results record that holds what is scored.
        overlap: Name of the similarity between an object and a detection.
        summary: Its figures, in COCO's order.
    """

    title: str
    field: str
    overlap: str
    summary: tuple[SummaryLine, ...]


# By iou_type; the later one says more of what a model is made for.
SCORE_KINDS = {
    "bbox": ScoreKind("boxes", "bbox", "IoU", DETECTION_SUMMARY),
    "segm": ScoreKind("masks", "segmentation", "IoU", DETECTION_SUMMARY),
    "keypoints": ScoreKind("keypoints", "keypoints", "OKS", KEYPOINT_SUMMARY),
}

Figures = dict[str, float | None]


def build_params(iou_type: str, *, sigmas: np.ndarray | None = None, max_dets: int | None = None) -> Params:
    """Return pycocotools' parameters.

    Args:
        iou_type: "bbox", "segm" or "keypoints".
        sigmas: OKS sigmas, float64 [K]; COCO's 17 by default.
        max_dets: Detections per image and category that count; 100, or 20 for keypoints, by default.
    """
    params = Params(iou_type)
    if iou_type == "keypoints" and sigmas is not None:
        params.kpt_oks_sigmas = np.asarray(sigmas, dtype=np.float64)
    if max_dets is not None:
        params.maxDets = [max_dets] if iou_type == "keypoints" else [1, min(10, max_dets), max_dets]
    return params


def check_sigmas(sigmas: np.ndarray, num_keypoints: int) -> None:
    """Raise ValueError unless there is one positive finite sigma for every keypoint."""
    if num_keypoints == 0:
        raise ValueError("keypoints are to be scored, but the ground truth has none")
    if len(sigmas) != num_keypoints:
        raise ValueError(
            f"{len(sigmas)} OKS sigma(s) for objects with {num_keypoints} keypoints; "
            "give --kpt-oks-sigmas one value, or one per keypoint"
        )
    if not (np.isfinite(sigmas).all() and (np.asarray(sigmas) > 0).all()):
        raise ValueError(f"OKS sigmas must be positive and finite, got {np.asarray(sigmas).tolist()}")


def summarize(curves: Curves, params: Params) -> Figures:
    """Return COCO's summary figures by name; None where there is no object of that kind to find."""
    figures: Figures = {}
    for name, array, threshold, area, m in SCORE_KINDS[params.iouType].summary:
        values = getattr(curves, array)[..., params.areaRngLbl.index(area), m]
        if threshold is not None:
            values = values[np.isclose(params.iouThrs, threshold)]
        values = values[values > -1]
        figures[name] = float(np.mean(values)) if values.size else None
    return figures


def summarize_classes(curves: Curves, params: Params, names: list[str]) -> dict[str, Figures]:
    """Return the summary figures of every class by name."""
    rows = {}
    for k, name in enumerate(names):
        of_class = slice(k, k + 1)
        one = Curves(curves.precision[:, :, of_class], curves.recall[:, of_class], curves.scores[:, :, of_class])
        rows[name] = summarize(one, params)
    return rows


def format_coco_lines(iou_type: str, figures: Figures, max_dets: Sequence[int]) -> str:
    """Return figures as pycocotools prints them, to the letter: twelve lines, or ten for keypoints.

    Log readers made for torchvision's and Detectron2's output find them. Source of the format: ``COCOeval.summarize``.

    Args:
        iou_type: "bbox", "segm" or "keypoints".
        figures: Value of every summary line by name, from `summarize`; None is printed as -1.
        max_dets: The limits of detections per image, three, or one for keypoints: ``Params.maxDets``.
    """
    lines = [f"IoU metric: {iou_type}"]
    for name, array, threshold, area, m in KEYPOINT_SUMMARY if iou_type == "keypoints" else DETECTION_SUMMARY:
        title, kind = ("Average Precision", "(AP)") if array == "precision" else ("Average Recall", "(AR)")
        iou = "0.50:0.95" if threshold is None else f"{threshold:0.2f}"
        value = -1.0 if figures[name] is None else figures[name]
        lines.append(
            f" {title:<18} {kind} @[ IoU={iou:<9} | area={area:>6s} | maxDets={max_dets[m]:>3d} ] = {value:0.3f}"
        )
    return "\n".join(lines)
