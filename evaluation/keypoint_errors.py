"""How far each keypoint is off, in pixels and in object sizes: what an AP of 0 does not tell.

Detections and objects are paired by their boxes, not by OKS, so that a keypoint that is always wrong still shows.
"""

import io

import numpy as np

from evaluation.coco_matching import match_across_classes

# Shares of an object's size (the square root of its area) within which a keypoint counts as correct.
PCK_SHARES = (0.05, 0.1, 0.2)

Figures = dict[str, float | None]


class KeypointErrors:
    """Collects the distance of every labelled keypoint to its detection."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(
        self,
        image: int,
        iou: np.ndarray,
        scores: np.ndarray,
        points: np.ndarray,
        truth: np.ndarray,
        truth_areas: np.ndarray,
        truth_crowd: np.ndarray,
    ) -> None:
        """Note one image.

        Args:
            image: Its position among the evaluated ones.
            iou: float64 [D, G], of boxes; 0 where classes differ.
            scores: float64 [D].
            points: float64 [D, K, 3], detected.
            truth: float64 [G, K, 3].
            truth_areas: float64 [G].
            truth_crowd: bool [G], left out.
        """
        partners = match_across_classes(iou, scores, truth_crowd)
        detection_of = np.full(len(truth), -1)
        found = np.flatnonzero(partners >= 0)
        detection_of[partners[found]] = found
        objects, keypoints = np.nonzero((truth[:, :, 2] > 0) & ~truth_crowd[:, None])
        detected = detection_of[objects]
        distance = np.full(len(objects), np.nan)
        hit = detected >= 0
        offset = points[detected[hit], keypoints[hit], :2] - truth[objects[hit], keypoints[hit], :2]
        distance[hit] = np.sqrt(np.square(offset).sum(axis=1))
        sizes = np.sqrt(np.maximum(truth_areas[objects], 1))
        self.parts.append(
            (
                np.full(len(objects), image, dtype=np.int32),
                keypoints.astype(np.int16),
                distance.astype(np.float32),
                sizes.astype(np.float32),
            )
        )

    def columns(self) -> tuple[np.ndarray, ...]:
        """Return (image, keypoint, distance in pixels or NaN for a miss, object size) of all labelled keypoints."""
        dtypes = (np.int32, np.int16, np.float32, np.float32)
        if not self.parts:
            return tuple(np.zeros(0, dtype=dtype) for dtype in dtypes)
        return tuple(np.concatenate(column) for column in zip(*self.parts))

    def write(self, file: io.BytesIO) -> None:
        """Append the columns to ``file``."""
        for column in self.columns():
            np.save(file, column)

    def take_up(self, file: io.BytesIO, images: np.ndarray) -> None:
        """Add what another process wrote, for the images marked in ``images`` (bool)."""
        columns = [np.load(file) for _ in range(4)]
        wanted = images[columns[0]]
        self.parts.append(tuple(column[wanted] for column in columns))


def summarize_errors(errors: KeypointErrors, names: tuple[str, ...], num_keypoints: int) -> dict[str, Figures]:
    """Return per keypoint, and for "all": ``labelled``, ``missed`` (a share), mean and median error, PCK.

    Errors are over found keypoints, in pixels and relative to object size; PCK counts a miss as wrong.
    """
    _, keypoint, distance, size = errors.columns()
    rows: dict[str, Figures] = {}
    labels = names or tuple(str(k) for k in range(num_keypoints))
    for k, name in enumerate((*labels, "all")):
        of_keypoint = slice(None) if name == "all" and k == num_keypoints else keypoint == k
        d, s = distance[of_keypoint].astype(np.float64), size[of_keypoint].astype(np.float64)
        found = np.isfinite(d)
        row: Figures = {"labelled": len(d), "missed": float(1 - found.mean()) if len(d) else None}
        relative = d[found] / s[found]
        row |= {
            "mean_px": float(d[found].mean()) if found.any() else None,
            "median_px": float(np.median(d[found])) if found.any() else None,
            "mean_relative": float(relative.mean()) if found.any() else None,
        }
        for share in PCK_SHARES:
            row[f"PCK@{share:g}"] = float((relative <= share).sum() / len(d)) if len(d) else None
        rows[name] = row
    return rows


def format_errors(rows: dict[str, Figures]) -> str:
    """Return the errors as a table, one line per keypoint."""
    columns = ["labelled", "missed", "mean_px", "median_px", "mean_relative", *(f"PCK@{s:g}" for s in PCK_SHARES)]
    width = max([len(name) for name in rows] + [8])
    lines = [f"  {'keypoint':<{width}} " + " ".join(f"{column:>13}" for column in columns)]
    for name, row in rows.items():
        cells = []
        for column in columns:
            value = row[column]
            text = "n/a" if value is None else f"{value:.0f}" if column == "labelled" else f"{value:.3f}"
            cells.append(f"{text:>13}")
        lines.append(f"  {name:<{width}} " + " ".join(cells))
    return "\n".join(lines)
