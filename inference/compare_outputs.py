"""Does an exported model give what PyTorch gives: two sets of detections, compared within stated tolerances."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf

# How far exported detections may be off. Other runtimes add up in another order; a box moves by thousandths of a pixel.
BOX_TOLERANCE = 0.1  # pixels of the picture, also for keypoints
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 0.01  # share of a mask's pixels that may differ, those along its outline not counted

Outputs = Mapping[str, np.ndarray]


@dataclass
class Agreement:
    """What was compared, and the largest differences found.

    Attributes:
        detections: Pairs compared.
        box: Pixels.
        score: Class score, in 0..1.
        keypoint: Pixels.
        mask: Share of pixels.
        left_over: Detections at the very end of a list (lowest score) without a partner, which is allowed.
    """

    detections: int = 0
    box: float = 0.0
    score: float = 0.0
    keypoint: float = 0.0
    mask: float = 0.0
    left_over: int = 0

    def __str__(self) -> str:
        """Name the figures."""
        text = f"{self.detections} detections, boxes within {self.box:.2g} px, scores within {self.score:.2g}"
        text += f", keypoints within {self.keypoint:.2g} px" if self.keypoint else ""
        text += f", masks within {self.mask:.2%} of their pixels" if self.mask else ""
        return text + (f", {self.left_over} at the end of a list without partner" if self.left_over else "")


def compare_outputs(expected: Outputs, found: Outputs, agreement: Agreement, where: str) -> None:
    """Pair the detections of one picture and note the differences in ``agreement``.

    Detections pair up by label, box and score, not by position: equal scores may come in any order. One without a
    partner is allowed only where a list ends, within the tolerance of its lowest score.

    Args:
        expected: ``boxes`` [N, 4], ``labels`` [N], ``scores`` [N], perhaps ``masks`` [N, 1, H, W], ``keypoints``
            [N, K, 3], of PyTorch.
        found: The same of the exported model.
        agreement: Changed in place.
        where: Names the picture in errors.

    Raises:
        ValueError: They do not agree; the text says where and by how much.
    """
    missing = set(expected) - set(found)
    if missing:
        raise ValueError(f"{where}: the exported model has no output {', '.join(sorted(missing))}")
    partners = pair_detections(expected, found)
    unpaired = [float(expected["scores"][n]) for n in np.flatnonzero(partners < 0)]
    unpaired += [float(found["scores"][n]) for n in set(range(len(found["scores"]))) - set(partners.tolist())]
    lowest = max((float(o["scores"].min()) for o in (expected, found) if len(o["scores"])), default=0.0)
    for score in unpaired:
        if score > lowest + SCORE_TOLERANCE:
            raise ValueError(
                f"{where}: a detection of score {score:.4f} has no partner with its label within {BOX_TOLERANCE} px "
                f"and {SCORE_TOLERANCE} of its score ({len(expected['scores'])} detections in PyTorch, "
                f"{len(found['scores'])} in the exported model)"
            )
    agreement.left_over += len(unpaired)
    for n in np.flatnonzero(partners >= 0):
        m = partners[n]
        agreement.detections += 1
        agreement.box = max(agreement.box, float(np.abs(expected["boxes"][n] - found["boxes"][m]).max()))
        agreement.score = max(agreement.score, float(abs(expected["scores"][n] - found["scores"][m])))
        if "keypoints" in expected:
            off = float(np.abs(expected["keypoints"][n] - found["keypoints"][m]).max())
            agreement.keypoint = max(agreement.keypoint, off)
            if off > BOX_TOLERANCE:
                raise ValueError(
                    f"{where}: a keypoint of detection {n} is off by {off:.3g} px, more than {BOX_TOLERANCE}"
                )
        if "masks" in expected:
            share = share_off_outline(expected["masks"][n, 0] > 0.5, found["masks"][m, 0] > 0.5)
            agreement.mask = max(agreement.mask, share)
            if share > MASK_TOLERANCE:
                text = f"differs in {share:.2%} of its pixels beyond its outline, more than {MASK_TOLERANCE:.0%}"
                raise ValueError(f"{where}: the mask of detection {n} {text}")


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
