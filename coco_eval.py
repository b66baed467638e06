"""Detections to COCO metrics: matched image by image as they come, on one process or many.

pycocotools defines the result: its mask library, its ``Params`` and its rules, to the last bit. An evaluator keeps
some thirty bytes per detection; at the end the ranks' bytes meet on rank 0, which accumulates and hands the same
metrics to all. OKS sigmas are set on ``Params.kpt_oks_sigmas``; no installed file is edited.
"""

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from annotations.arrays import Annotations
from annotations.labels import LabelMap
from annotations.object_masks import mask_block, mask_rle
from evaluation.coco_matching import (
    Grid,
    Matches,
    accumulate,
    match_across_classes,
    match_image,
    rank_detections,
)
from evaluation.coco_metrics import (
    SCORE_KINDS,
    build_params,
    check_sigmas,
    format_coco_lines,
    summarize,
    summarize_classes,
)
from evaluation.detections import Detections, detections_from_output
from evaluation.eval_result import EvalResult, SavedMatches
from evaluation.keypoint_errors import KeypointErrors, format_errors, summarize_errors
from evaluation.similarity import BlockMasks, RleMasks, box_iou, keypoint_extent, mask_iou, object_keypoint_similarity
from pixels.masks import MaskBlock
from utils import broadcast_json, gather_bytes

logger = logging.getLogger(__name__)

OKS_AREAS = ("annotation", "box", "box53")


class CocoEvaluator:
    """Scores detections of any model against one split.

    Args:
        annotations: Ground truth of the split.
        iou_types: "bbox", "segm" and "keypoints", what to score.
        indices: Which images of the split are evaluated; all by default. Others do not exist for the score.
        sigmas: OKS sigmas, float64 [K].
        oks_area: What OKS takes for an object's area: ``annotation`` the file's, ``box`` width times height,
            ``box53`` 0.53 of that (the share of a person's box that the person covers, as in xtcocotools).
        max_dets: Detections per image and category that count.

    Raises:
        ValueError: The number of sigmas is not that of the keypoints, or an option is unknown.
    """

    def __init__(
        self,
        annotations: Annotations,
        iou_types: Sequence[str],
        *,
        indices: np.ndarray | None = None,
        sigmas: np.ndarray | None = None,
        oks_area: str = "annotation",
        max_dets: int | None = None,
    ) -> None:
        if oks_area not in OKS_AREAS:
            raise ValueError(f"unknown OKS area {oks_area!r}; expected one of {', '.join(OKS_AREAS)}")
        self.annotations, self.iou_types, self.oks_area = annotations, tuple(iou_types), oks_area
        self.params = {t: build_params(t, sigmas=sigmas, max_dets=max_dets) for t in self.iou_types}
        if "keypoints" in self.params and annotations.num_objects:
            check_sigmas(self.params["keypoints"].kpt_oks_sigmas, annotations.num_keypoints)
        self.grids = {t: Grid.of(params) for t, params in self.params.items()}

        indices = np.arange(len(annotations)) if indices is None else np.asarray(indices)
        self.indices = indices[np.argsort(annotations.image_ids[indices], kind="stable")]
        ids = annotations.image_ids[self.indices].tolist()
        self.position_of = {image_id: position for position, image_id in enumerate(ids)}
        self.category_ids = np.array([id_ for id_, _ in annotations.categories], dtype=np.int64)
        self.truth_categories = annotations.object_classes()
        self.areas = {t: self._areas(t) for t in self.iou_types}
        self.ignored = {t: self._ignored(t) for t in self.iou_types}
        self.reset()

    @property
    def max_keypoint_dets(self) -> int:
        """Detections per image and category whose keypoints are read."""
        return self.grids["keypoints"].max_dets[-1] if "keypoints" in self.grids else 0

    def reset(self) -> None:
        """Forget all detections."""
        self.parts: dict[str, list[Matches]] = {t: [] for t in self.iou_types}
        self.seen: set[int] = set()
        self.errors = KeypointErrors()

    def _areas(self, iou_type: str) -> np.ndarray:
        """Return the area of every object, float64 [N]."""
        boxes = self.annotations.boxes_xywh
        if iou_type != "keypoints" or self.oks_area == "annotation":
            return self.annotations.areas
        return boxes[:, 2] * boxes[:, 3] * (0.53 if self.oks_area == "box53" else 1.0)

    def _ignored(self, iou_type: str) -> np.ndarray:
        """Return which objects never count, bool [N]."""
        if iou_type != "keypoints":
            return self.annotations.is_crowd
        return self.annotations.is_crowd | (self.annotations.num_labelled_keypoints() == 0)

    def update(
        self, image_ids: Sequence[int], outputs: Sequence[Mapping[str, Any]], label_map: LabelMap
    ) -> list[Detections]:
        """Match a batch of a torchvision model's outputs; returns them in the dataset's terms."""
        batch = [detections_from_output(output, label_map) for output in outputs]
        for image_id, detections in zip(image_ids, batch):
            self.add(image_id, detections)
        return batch

    def add(self, image_id: int, detections: Detections) -> None:
        """Match one image's detections; an image seen before is left out, and so are unknown categories.

        Raises:
            ValueError: The image is not among the evaluated ones, or a number is not finite.
        """
        self.add_by_type(image_id, dict.fromkeys(self.iou_types, detections))

    def add_by_type(self, image_id: int, detections: Mapping[str, Detections]) -> None:
        """Do as `add` with other detections for each kind of score."""
        position = self.position_of.get(int(image_id))
        if position is None:
            raise ValueError(f"image id {image_id} is not among the {len(self.indices)} evaluated images")
        if position in self.seen:
            return
        self.seen.add(position)
        for iou_type in self.iou_types:
            self.parts[iou_type].append(self._match(iou_type, position, detections[iou_type]))

    def _match(self, iou_type: str, position: int, detections: Detections) -> Matches:
        """Match one image's detections for one kind of score."""
        i = int(self.indices[position])
        grid = self.grids[iou_type]
        categories = np.searchsorted(self.category_ids, detections.category_ids).clip(max=len(self.category_ids) - 1)
        known = self.category_ids[categories] == detections.category_ids
        if not known.all():
            detections, categories = detections.take(np.flatnonzero(known)), categories[known]
        self._check_finite(i, iou_type, "score", detections.scores)
        kept, ranks = rank_detections(categories, detections.scores, grid.max_dets[-1])
        detections, categories = detections.take(kept), categories[kept]
        places = {"bbox": detections.boxes_xywh, "keypoints": detections.keypoints}.get(iou_type)
        self._check_finite(i, iou_type, "coordinate", places)
        objects = self.annotations.objects(i)
        truth_categories, crowd = self.truth_categories[objects], self.annotations.is_crowd[objects]
        same = categories[:, None] == truth_categories[None, :]
        partners = np.full(len(kept), -1)
        if iou_type == "bbox":
            assert detections.boxes_xywh is not None
            iou = box_iou(detections.boxes_xywh, self.annotations.boxes_xywh[objects], crowd)
            similarity, areas = np.where(same, iou, -1.0), detections.boxes_xywh[:, 2:].prod(axis=1)
            partners = match_across_classes(iou, detections.scores, crowd)
            on_object = partners >= 0
            partners[on_object] = truth_categories[partners[on_object]]
        elif iou_type == "segm":
            similarity, areas = self._mask_similarity(i, objects, detections, same)
        else:
            similarity, areas = self._keypoint_similarity(objects, detections, same)
            self._note_errors(position, objects, detections, same)
        positive, ignored = match_image(
            similarity, areas, self.areas[iou_type][objects], self.ignored[iou_type][objects], crowd, grid
        )
        positions = np.full(len(kept), position)
        return Matches(positions, categories, ranks, partners, detections.scores, positive, ignored)

    def _check_finite(self, i: int, iou_type: str, what: str, values: np.ndarray | None) -> None:
        """Raise ValueError for numbers that are not finite; COCOeval gives a NaN score AP 1.0."""
        if values is not None and not np.isfinite(values).all():
            image_id = int(self.annotations.image_ids[i])
            raise ValueError(f"image id {image_id}: a {what} of a detection is not finite ({iou_type})")

    def _mask_similarity(
        self, i: int, objects: slice, detections: Detections, same: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (IoU [D, G], detection areas [D])."""
        assert detections.masks is not None
        annotations, wanted = self.annotations, np.flatnonzero(same.any(axis=0))
        size = int(annotations.heights[i]), int(annotations.widths[i])
        crowd, lowest = annotations.is_crowd[objects][wanted], float(self.grids["segm"].thresholds[0])
        similarity = np.full(same.shape, -1.0)
        blocks = [mask for mask in detections.masks if isinstance(mask, MaskBlock)]
        if len(blocks) == len(detections.masks):
            masks = BlockMasks(blocks)
            truth = BlockMasks([mask_block(annotations, i, objects.start + g) for g in wanted])
            similarity[:, wanted] = mask_iou(masks, truth, same[:, wanted], crowd, lowest)
            return similarity, masks.areas
        rles = RleMasks([mask for mask in detections.masks if isinstance(mask, dict)], size)
        truth_rles = RleMasks([mask_rle(annotations, i, objects.start + g) for g in wanted], size)
        similarity[:, wanted] = mask_iou(rles, truth_rles, same[:, wanted], crowd, lowest)
        return similarity, rles.areas

    def _keypoint_similarity(
        self, objects: slice, detections: Detections, same: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (OKS [D, G], detection areas [D])."""
        points = detections.keypoints
        assert points is not None
        similarity = np.full(same.shape, -1.0)
        for g in np.flatnonzero(same.any(axis=0)).tolist():
            n, chosen = objects.start + g, np.flatnonzero(same[:, g])
            similarity[chosen, g] = object_keypoint_similarity(
                points[chosen],
                self.annotations.keypoints[n],
                self.annotations.boxes_xywh[n],
                float(self.areas["keypoints"][n]),
                self.params["keypoints"].kpt_oks_sigmas,
            )
        return similarity, keypoint_extent(points)

    def _note_errors(self, position: int, objects: slice, detections: Detections, same: np.ndarray) -> None:
        """Measure how far off the keypoints are; results without boxes leave nothing to pair objects by."""
        if detections.boxes_xywh is None or detections.keypoints is None:
            return
        annotations, crowd = self.annotations, self.annotations.is_crowd[objects]
        iou = np.where(same, box_iou(detections.boxes_xywh, annotations.boxes_xywh[objects], crowd), 0.0)
        truth, areas = annotations.keypoints[objects], self.areas["keypoints"][objects]
        self.errors.add(position, iou, detections.scores, detections.keypoints, truth, areas, crowd)

    def compute(self) -> EvalResult:
        """Bring all ranks' matches together, accumulate on rank 0, and return the metrics on every rank.

        All ranks must call it.
        """
        gathered = self._gather()
        if gathered is None:
            return EvalResult(**broadcast_json(None))
        seen, matches, errors = gathered
        if len(seen) < len(self.indices):
            logger.warning("%d of %d images were evaluated", len(seen), len(self.indices))
        num_truths = {t: self._num_truths(t, seen) for t in self.iou_types}
        curves = {t: accumulate(matches[t], num_truths[t], self.grids[t]) for t in self.iou_types}
        names = [name for _, name in self.annotations.categories]
        num_keypoints = self.annotations.num_keypoints if len(errors.columns()[0]) else 0
        points = self.annotations.keypoint_names
        summary: dict[str, Any] = {
            "keypoint_errors": summarize_errors(errors, points, num_keypoints) if num_keypoints else {},
            "metrics": {t: summarize(curves[t], self.params[t]) for t in self.iou_types},
            "per_class": {t: summarize_classes(curves[t], self.params[t], names) for t in self.iou_types},
            "settings": self._settings(len(seen)),
        }
        positions = self.indices[seen]
        return EvalResult(
            **broadcast_json(summary),
            curves=curves,
            saved=self._saved_matches(seen, matches, summary["settings"]),
            num_truths=num_truths,
            positions=positions,
            is_background=np.diff(self.annotations.object_starts)[positions] == 0,
        )

    def _saved_matches(
        self, seen: np.ndarray, matches: dict[str, Matches], settings: dict[str, Any]
    ) -> dict[str, SavedMatches]:
        """Return what each kind of score keeps, with images numbered among those that were evaluated."""
        annotations = self.annotations
        position = np.full(len(annotations), -1, dtype=np.int32)
        position[self.indices[seen]] = np.arange(len(seen))
        truth_images = position[annotations.object_images()]
        fingerprint = _fingerprint(annotations, truth_images >= 0)
        saved = {}
        for t in self.iou_types:
            low, high = self.grids[t].area_ranges[0]
            counts = ~self.ignored[t] & (truth_images >= 0) & (self.areas[t] >= low) & (self.areas[t] <= high)
            images, *others = matches[t].columns()
            saved[t] = SavedMatches(
                Matches(np.searchsorted(seen, images).astype(np.int32), *others),
                truth_images[counts],
                self.truth_categories[counts].astype(np.int16),
                annotations.image_ids[self.indices[seen]],
                tuple(name for _, name in annotations.categories),
                self.grids[t].thresholds,
                self.grids[t].recall_grid,
                fingerprint,
                settings,
            )
        return saved

    def _gather(self) -> tuple[np.ndarray, dict[str, Matches], KeypointErrors] | None:
        """Return on rank 0 (positions of the evaluated images, sorted matches of each kind, errors), None elsewhere."""
        buffer = io.BytesIO()
        np.save(buffer, np.array(sorted(self.seen), dtype=np.int32))
        for t in self.iou_types:
            self.parts[t] = [Matches.join(self.parts[t])]
            _write_matches(buffer, self.parts[t][0], self.grids[t].num_bits)
        self.errors.write(buffer)
        parts = gather_bytes(buffer.getvalue())
        if parts is None:
            return None
        gathered: dict[str, list[Matches]] = {t: [] for t in self.iou_types}
        errors = KeypointErrors()
        already = np.zeros(len(self.indices), dtype=bool)
        for part in parts:
            reader = io.BytesIO(part)
            fresh = np.zeros(len(self.indices), dtype=bool)
            fresh[np.load(reader)] = True
            fresh &= ~already  # an image that two ranks have seen counts once
            for t in self.iou_types:
                matches = _read_matches(reader, self.grids[t].num_bits)
                gathered[t].append(matches.take(fresh[matches.images]))
            errors.take_up(reader, fresh)
            already |= fresh
        return np.flatnonzero(already), {t: Matches.join(gathered[t]).sorted() for t in self.iou_types}, errors

    def _num_truths(self, iou_type: str, seen: np.ndarray) -> np.ndarray:
        """Return the number of objects that count per category and area range, int64 [K, A]."""
        annotations, areas = self.annotations, self.areas[iou_type]
        is_seen = np.zeros(len(annotations), dtype=bool)
        is_seen[self.indices[seen]] = True
        counts = np.repeat(is_seen, np.diff(annotations.object_starts)) & ~self.ignored[iou_type]
        columns = []
        for low, high in self.grids[iou_type].area_ranges:
            inside = counts & (areas >= low) & (areas <= high)
            columns.append(np.bincount(self.truth_categories[inside], minlength=len(self.category_ids)))
        return np.stack(columns, axis=1)

    def _settings(self, num_images: int) -> dict[str, Any]:
        """Return what the figures depend on."""
        settings: dict[str, Any] = {"num_images": num_images, "pycocotools": version("pycocotools")}
        for t in self.iou_types:
            settings[f"max_dets_{t}"] = [int(m) for m in self.params[t].maxDets]
        if "keypoints" in self.params:
            settings["kpt_oks_sigmas"] = [float(s) for s in self.params["keypoints"].kpt_oks_sigmas]
            settings["oks_area"] = self.oks_area
        return settings


def _fingerprint(annotations: Annotations, is_seen: np.ndarray) -> str:
    """Return a hash of the objects marked in ``is_seen``, bool [N]; masks count by their boxes and areas."""
    names = ("category_ids", "boxes_xywh", "areas", "is_crowd", "keypoints")
    columns = [getattr(annotations, name) for name in names]
    return hashlib.sha256(b"".join(column[is_seen].tobytes() for column in columns)).hexdigest()


def _write_matches(file: io.BytesIO, matches: Matches, num_bits: int) -> None:
    """Append the columns of matches to ``file``; of the bit columns only the bytes in use."""
    num_bytes = -(-num_bits // 8)
    *others, positive, ignored = matches.columns()
    for column in others:
        np.save(file, column)
    for bits in (positive, ignored):
        np.save(file, np.ascontiguousarray(bits.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :num_bytes]))


def _read_matches(file: io.BytesIO, num_bits: int) -> Matches:
    """Read what `_write_matches` wrote."""
    *others, positive, ignored = (np.load(file) for _ in range(7))
    wide = []
    for columns in (positive, ignored):
        padded = np.zeros((len(columns), 8), dtype=np.uint8)
        padded[:, : columns.shape[1]] = columns
        wide.append(padded.view("<u8")[:, 0].astype(np.uint64))
    return Matches(*others, *wide)


def format_summary(result: EvalResult) -> str:
    """Return the figures as text: by name, a block per kind of score, and once more in pycocotools' own lines."""
    lines = []
    for iou_type, figures in result.metrics.items():
        lines.append(f"{SCORE_KINDS[iou_type].title} (COCO, {result.settings['num_images']} images)")
        for name, value in figures.items():
            text = "n/a (no such object in the ground truth)" if value is None else f"{value:.4f}"
            lines.append(f"  {name:<10} {text}")
    if result.keypoint_errors:
        lines += ["keypoints, of objects whose box was found:", format_errors(result.keypoint_errors)]
    for iou_type, figures in result.metrics.items():
        lines.append(format_coco_lines(iou_type, figures, result.settings[f"max_dets_{iou_type}"]))
    return "\n".join(lines)
