"""Does an exported model give what PyTorch gives: two sets of detections, compared within stated tolerances."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import nn
from torchvision.ops import box_iou

# How far exported detections may be off. Other runtimes add up in another order; a box moves by thousandths of a pixel.
BOX_TOLERANCE = 0.1  # pixels of the picture, also for keypoints
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 0.01  # share of a mask's pixels that may differ, those along its outline not counted

# From this IoU on one of two detections of a class is suppressed, in the detector that suppresses most (SSD).
SAME_OBJECT = 0.45

Outputs = Mapping[str, np.ndarray]


@dataclass
class Agreement:
    """What was compared, and the largest differences found.

    Attributes:
        pictures: Pictures given to both, turned and mirrored ones included.
        detections: Pairs compared.
        box: Pixels.
        score: Class score, in 0..1.
        keypoint: Pixels.
        mask: Share of pixels.
        left_over: Detections at the very end of a list (lowest score) without a partner, which is allowed.
        near_ties: Detections in whose place another one of the same score was chosen.
    """

    pictures: int = 0
    detections: int = 0
    box: float = 0.0
    score: float = 0.0
    keypoint: float = 0.0
    mask: float = 0.0
    left_over: int = 0
    near_ties: int = 0

    def __str__(self) -> str:
        """Name the figures."""
        text = f"{self.detections} detections, boxes within {self.box:.2g} px, scores within {self.score:.2g}"
        text += f", keypoints within {self.keypoint:.2g} px" if self.keypoint else ""
        text += f", masks within {self.mask:.2%} of their pixels" if self.mask else ""
        text += f", {self.near_ties} others chosen where scores are equal" if self.near_ties else ""
        return text + (f", {self.left_over} at the end of a list without partner" if self.left_over else "")

    def against_limits(self) -> str:
        """Name the largest differences beside what is allowed."""
        figures = [(self.box, BOX_TOLERANCE, "of boxes", "px"), (self.score, SCORE_TOLERANCE, "of scores", "")]
        figures.append((self.keypoint, BOX_TOLERANCE, "of keypoints", "px"))
        figures.append((100 * self.mask, 100 * MASK_TOLERANCE, "of masks", "% of their pixels"))
        texts = [
            f"{what} {value:.2g}{' ' if unit else ''}{unit} (at most {limit:g})"
            for value, limit, what, unit in figures
            if value
        ]
        return f"largest difference {', '.join(texts)}" if texts else "no two of them were partners"

    def note_pair(self, box: float, score: float) -> None:
        """Take the differences of a pair."""
        self.box, self.score = max(self.box, box), max(self.score, score)


def compare_outputs(
    expected: Outputs,
    found: Outputs,
    agreement: Agreement,
    where: str,
    candidates: Callable[[], Outputs] | None = None,
    *,
    has_proposals: bool = False,
) -> None:
    """Pair the detections of one picture and note the differences in ``agreement``.

    Detections pair up by label, box and score, not by position: equal scores may come in any order. One without a
    partner is allowed where a list ends, within the tolerance of its lowest score, and where another one was chosen of
    several that overlap, see `_are_near_ties`.

    Args:
        expected: ``boxes`` [N, 4], ``labels`` [N], ``scores`` [N], perhaps ``masks`` [N, 1, H, W], ``keypoints``
            [N, K, 3], of PyTorch.
        found: The same of the exported model.
        agreement: Changed in place, also where they do not agree.
        where: Names the picture in errors.
        candidates: Returns boxes, labels and scores of PyTorch before those that overlap are suppressed; None accepts
            no near-ties.
        has_proposals: Whether boxes come from proposals, which nearly tie before they have their scores.

    Raises:
        ValueError: They do not agree; the text says where and by how much.
    """
    missing = set(expected) - set(found)
    if missing:
        raise ValueError(f"{where}: the exported model has no output {', '.join(sorted(missing))}")
    problems: list[str] = []
    partners = pair_detections(expected, found)
    paired = set(partners.tolist())
    lone = np.flatnonzero(partners < 0)
    others = np.array([m for m in range(len(found["scores"])) if m not in paired], dtype=np.int64)
    if len(lone) and len(others) and candidates is not None:
        is_tie, is_other_tie = _are_near_ties(_take(expected, lone), _take(found, others), candidates(), has_proposals)
        agreement.near_ties += int(is_tie.sum())
        lone, others = lone[~is_tie], others[~is_other_tie]
    lowest = max((float(o["scores"].min()) for o in (expected, found) if len(o["scores"])), default=0.0)
    for mine, yours, positions in ((expected, found, lone), (found, expected, others)):
        for n in positions.tolist():
            score = float(mine["scores"][n])
            if score <= lowest + SCORE_TOLERANCE:
                agreement.left_over += 1
                continue
            problems.append(
                f"a detection of score {score:.4f} has no partner with its label within {BOX_TOLERANCE} px and "
                f"{SCORE_TOLERANCE} of its score ({len(expected['scores'])} detections in PyTorch, "
                f"{len(found['scores'])} in the exported model){_nearest(mine, n, yours, agreement)}"
            )
    for n in np.flatnonzero(partners >= 0).tolist():
        agreement.detections += 1
        problems += _compare_pair(expected, n, found, int(partners[n]), agreement)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {problems[0]}{more}")


def _compare_pair(expected: Outputs, n: int, found: Outputs, m: int, agreement: Agreement) -> list[str]:
    """Note how far a detection and its partner are from each other; returns what is too far."""
    problems = []
    box = float(np.abs(expected["boxes"][n] - found["boxes"][m]).max())
    agreement.note_pair(box, float(abs(expected["scores"][n] - found["scores"][m])))
    if "keypoints" in expected:
        off = float(np.abs(expected["keypoints"][n] - found["keypoints"][m]).max())
        agreement.keypoint = max(agreement.keypoint, off)
        if off > BOX_TOLERANCE:
            problems.append(f"a keypoint of detection {n} is off by {off:.3g} px, more than {BOX_TOLERANCE}")
    if "masks" in expected:
        share = share_off_outline(expected["masks"][n, 0] > 0.5, found["masks"][m, 0] > 0.5)
        agreement.mask = max(agreement.mask, share)
        if share > MASK_TOLERANCE:
            text = f"differs in {share:.2%} of its pixels beyond its outline, more than {MASK_TOLERANCE:.0%}"
            problems.append(f"the mask of detection {n} {text}")
    return problems


def _take(outputs: Outputs, positions: np.ndarray) -> Outputs:
    """Return boxes, labels and scores of some detections."""
    return {name: outputs[name][positions] for name in ("boxes", "labels", "scores")}


def _overlaps(first: Outputs, second: Outputs) -> np.ndarray:
    """Return the IoU of all pairs, 0 where the labels differ; float64 [N, M]."""
    iou = box_iou(torch.from_numpy(np.array(first["boxes"])), torch.from_numpy(np.array(second["boxes"]))).numpy()
    return np.where(first["labels"][:, None] == second["labels"][None], iou, 0.0)


def _nearest(mine: Outputs, n: int, yours: Outputs, agreement: Agreement) -> str:
    """Say, and note, how far the detection is that overlaps detection ``n`` most and has its label."""
    iou = _overlaps(_take(mine, np.array([n])), yours)[0]
    if not len(iou) or iou.max() < SAME_OBJECT:
        return "; none with its label overlaps it by half"
    m = int(iou.argmax())
    box = float(np.abs(mine["boxes"][n] - yours["boxes"][m]).max())
    score = float(abs(mine["scores"][n] - yours["scores"][m]))
    agreement.note_pair(box, score)
    return f"; the one that overlaps it most is {box:.2g} px and {score:.2g} of its score away"


def _are_near_ties(
    lone: Outputs, others: Outputs, candidates: Outputs, has_proposals: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tell which detections without a partner are there because of two that overlap another was chosen.

    Of detections that overlap, the one with the highest score stays; where scores are equal, their last digits choose.
    A detection is missing on the other side for this reason if one stands there, without a partner too, that has its
    label, overlaps it, and has at least its score but for the tolerance; of two proposals that nearly tie either may
    get the higher score later. That of the exported model must have been a candidate of PyTorch as well, within the
    tolerances: a wrong box or score is no near-tie.

    Returns:
        Of ``lone`` of PyTorch and of ``others`` of the exported model, bool [N] and bool [M].
    """
    is_candidate = pair_detections(others, candidates) >= 0
    rivals = (_overlaps(lone, others) >= SAME_OBJECT) & is_candidate[None]
    gap = np.where(has_proposals, 0.0, lone["scores"][:, None] - others["scores"][None])
    is_tie: np.ndarray = np.any(rivals & (gap <= SCORE_TOLERANCE), axis=1)
    is_other_tie: np.ndarray = np.any(rivals & (gap >= -SCORE_TOLERANCE), axis=0)
    return is_tie, is_other_tie


@contextlib.contextmanager
def without_suppression(model: nn.Module) -> Iterator[None]:
    """Let a detector give all its candidates, boxes with labels and scores alone, also those that overlap.

    The proposals of an R-CNN are suppressed as well, and what becomes of one that nearly ties is another detection.
    """
    owner: Any = getattr(model, "roi_heads", model)
    changes: list[tuple[Any, str, Any]] = [(owner, "nms_thresh", 1.0), (owner, "detections_per_img", sys.maxsize)]
    changes += [(owner, name, None) for name in ("mask_roi_pool", "keypoint_roi_pool") if hasattr(owner, name)]
    if rpn := getattr(model, "rpn", None):
        all_of_them = dict.fromkeys(rpn._post_nms_top_n, sys.maxsize)
        changes += [(rpn, "nms_thresh", 1.0), (rpn, "_post_nms_top_n", all_of_them)]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def share_off_outline(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the share of a mask's pixels that differ and are more than one pixel off its outline.

    Masks are pasted into boxes of whole pixels: a box that differs by a thousandth may move its mask by a pixel.

    Args:
        ours: bool [H, W].
        theirs: bool [H, W].
    """
    mask = torch.from_numpy(ours)[None].to(torch.float32)
    grown = nnf.max_pool2d(mask, 3, stride=1, padding=1)[0].numpy() > 0
    shrunk = nnf.max_pool2d(1 - mask, 3, stride=1, padding=1)[0].numpy() == 0
    off = np.sum(theirs & ~grown) + np.sum(~theirs & shrunk)
    return float(off) / max(int(np.sum(ours | theirs)), 1)


def pair_detections(expected: Outputs, found: Outputs) -> np.ndarray:
    """Return for each expected detection the position of its own partner in ``found``, -1 without one; int64 [N]."""
    partners = np.full(len(expected["scores"]), -1, dtype=np.int64)
    if not len(found["scores"]):
        return partners
    free = np.ones(len(found["scores"]), dtype=bool)
    for n in range(len(partners)):
        off = np.abs(found["boxes"] - expected["boxes"][n]).max(axis=1)
        fits = free & (found["labels"] == expected["labels"][n]) & (off <= BOX_TOLERANCE)
        fits &= np.abs(found["scores"] - expected["scores"][n]) <= SCORE_TOLERANCE
        if fits.any():
            partners[n] = int(np.where(fits, off, np.inf).argmin())
            free[partners[n]] = False
    return partners
