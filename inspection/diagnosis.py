"""A dataset tried as training would use it, and looked at more closely than training does.

Errors come from the functions that training itself calls, in its order, so both say the same; where one stops
training, the rest of the data is read without what is wrong, and looked at all the same.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from annotations.findings import BadDataError, Finding, Findings
from annotations.image_checks import check_decoding, check_files
from inspection.anchor_reach import AnchorGrids, build_skeleton_model, reach_of_anchors, resize_objects
from inspection.anchor_suggestion import suggest_anchors
from inspection.dataset_statistics import (
    SplitObjects,
    check_box_format,
    check_classes,
    check_repeated_objects,
    check_segmentations_against_boxes,
    check_sizes,
    format_sizes,
    format_split,
)
from inspection.keypoint_statistics import check_keypoint_labels, format_keypoints
from inspection.observations import Observation, observe_worst
from loading.duplicates import Fingerprints, find_equal_pairs, fingerprint_images
from loading.samples import ImageFolder
from loading.split import Split
from loading.splits import Data, Source, load_data
from models.architectures import ModelSpec

Built = TypeVar("Built")

# Grey levels of 255: below the first a picture is black, above the second white; with no more between its darkest and
# its brightest it is flat.
BLACK, WHITE, FLAT = 16, 239, 3


class _Collector(logging.Handler):
    """Collects what is logged: a `Finding` as it is, any other warning as a finding that is all problem."""

    def __init__(self) -> None:
        super().__init__()
        self.info: list[str] = []
        self.warnings: list[Finding] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's text once, and a finding as it is."""
        if record.levelno < logging.WARNING:
            if record.getMessage() not in self.info:
                self.info.append(record.getMessage())
            return
        logged = record.args[0] if isinstance(record.args, tuple) and len(record.args) == 1 else None
        finding = logged if isinstance(logged, Finding) else _as_finding(record.getMessage(), is_error=False)
        if finding not in self.warnings:
            self.warnings.append(finding)


def _as_finding(text: str, *, is_error: bool) -> Finding:
    """Return a text that names its place and remedy itself as a finding."""
    return Finding("cannot be used" if is_error else "warning", "", text, "", is_error)


@contextlib.contextmanager
def collected_log() -> Iterator[_Collector]:
    """Collect what is logged instead of printing it."""
    root, collector = logging.getLogger(), _Collector()
    handlers, level = root.handlers, root.level
    root.handlers = [collector]
    root.setLevel(logging.INFO)
    try:
        yield collector
    finally:
        root.handlers = handlers
        root.setLevel(level)


@dataclass
class Trial:
    """What came of trying to start a training.

    Attributes:
        errors: Why it does not start.
        warnings: What training warns of.
        info: Lines that training prints.
        data: What was read, without what is wrong; None where nothing could be.
    """

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    info: list[str] = field(default_factory=list)
    data: Data | None = None

    def add_errors(self, findings: Sequence[Finding]) -> None:
        """Add findings that are not known yet."""
        known = set(self.errors)
        self.errors.extend(f for f in findings if f.is_error and f not in known)


def try_training_data(source: Source, task: str, build: Callable[[Data], Built]) -> tuple[Trial, Built | None]:
    """Do with the data what training does before its first step.

    Args:
        source: Which data.
        task: ``box``, ``mask`` or ``keypoint``: what the model learns.
        build: Makes of the data what training makes; its ValueErrors are errors of the data too.

    Returns:
        (what came of it, what ``build`` returned or None).
    """
    trial = Trial()
    built = None
    with collected_log() as log:
        try:
            trial.data = load_data(source, task)
            built = build(trial.data)
        except (ValueError, FileNotFoundError) as error:
            trial.add_errors(_findings_of(error))
    trial.info, trial.warnings = log.info, log.warnings
    if not trial.errors:
        return trial, built
    with collected_log():  # the same again with less in it: nothing new for the user
        for role in ("train", "val"):
            try:
                source.load(role, task=task)
            except BadDataError as error:
                trial.add_errors(error.findings)
            except (ValueError, FileNotFoundError):
                pass  # known, or a consequence of what is known
        with contextlib.suppress(ValueError, FileNotFoundError):
            trial.data = trial.data or load_data(replace(source, on_bad_data="skip"), task)
            built = build(trial.data)
    return trial, built


def _findings_of(error: ValueError | FileNotFoundError) -> list[Finding]:
    """Return the findings behind an error; one without them is a finding itself."""
    if isinstance(error, BadDataError):
        return error.findings
    return [_as_finding(str(error), is_error=True)]


def check_pictures(split: Split, trial: Trial, source: Source, workers: int | None = None) -> np.ndarray:
    """Decode every image of a split, as training does sooner or later; returns the good ones, int64."""
    if not isinstance(split.images, ImageFolder):
        return split.indices
    # Only folders leave a broken picture out when asked to; elsewhere training stops at it.
    findings = Findings(source.on_bad_data if source.kind.has_own_json else "error")
    check_files(split.annotations, split.images.root, findings)
    present = np.setdiff1d(np.arange(len(split.annotations)), sorted(findings.dropped_images))
    check_decoding(
        split.annotations,
        split.images.root,
        findings,
        apply_exif=split.images.apply_exif,
        cache_dir=source.cache_dir,
        indices=present,
        workers=workers,
    )
    trial.add_errors(findings.found)
    trial.warnings.extend(finding for finding in findings.warnings() if finding not in trial.warnings)
    return np.setdiff1d(split.indices, sorted(findings.dropped_images))


def look_at_pictures(
    data: Data, good: dict[str, np.ndarray], source: Source, workers: int | None = None
) -> tuple[list[Observation], list[str]]:
    """Look for pictures that EXIF turns, that occur twice or in both splits, or that show next to nothing.

    Args:
        data: Both splits.
        good: Images of the roles ``train`` and ``val`` that decode, int64.
        source: Where they come from.
        workers: Threads.

    Returns:
        (observations, lines of facts).
    """
    prints: dict[str, tuple[Split, Fingerprints]] = {}
    for role, split in (("train", data.train), ("val", data.val)):
        if split is not None and isinstance(split.images, ImageFolder):
            found = fingerprint_images(
                split.annotations, split.images, good[role], cache_dir=source.cache_dir, workers=workers
            )
            prints[role] = split, found
    seen: list[Observation] = []
    facts = []
    if len(prints) == 2:
        seen += _look_for_pairs("val", prints["val"], "train", prints["train"])
    for role, (split, found) in prints.items():
        seen += _look_for_pairs(role, (split, found))
        seen += _look_for_turned(role, split, found)
        seen += _look_for_empty(role, split, found)
        modes = {mode: found.modes.count(mode) for mode in sorted(set(found.modes) - {"RGB"})}
        if modes:
            listed = ", ".join(f"{count} of mode {mode}" for mode, count in modes.items())
            facts.append(f"{role}: pictures that are turned into RGB: {listed}")
    return seen, facts


def _look_for_pairs(
    role: str,
    own: tuple[Split, Fingerprints],
    other_role: str | None = None,
    other: tuple[Split, Fingerprints] | None = None,
) -> list[Observation]:
    """Look for pictures that occur twice in one split, or in two."""
    split, prints = own
    other_split, other_prints = other or own
    pairs = {a: (b, same) for a, b, same in find_equal_pairs(prints, other_prints if other else None)}

    def shown(a: int) -> str:
        b, same = pairs[a]
        first = split.annotations.file_name(int(prints.indices[a]))
        second = other_split.annotations.file_name(int(other_prints.indices[b]))
        prefixes = (f"{role}/", f"{other_role}/") if other else ("", "")
        return f"{prefixes[0]}{first} {'is the same file as' if same else 'looks like'} {prefixes[1]}{second}"

    scores = np.full(len(prints.indices), np.nan)
    for a, (_, same) in pairs.items():
        scores[a] = float(same)
    if other:
        title = f"pictures of {role} are also in {other_role}: scores will be too good"
        return observe_worst(title, scores, shown, "take them out of one of the two")
    title = f"pictures of {role} are copies of another one of {role}"
    return observe_worst(title, scores, shown, "remove the copies: they weigh double, and may be annotated differently")


def _look_for_turned(role: str, split: Split, prints: Fingerprints) -> list[Observation]:
    """Look for EXIF rotation."""
    assert isinstance(split.images, ImageFolder)
    if split.images.apply_exif:
        used = "they are read as viewers show them, and boxes must fit that"
    else:
        used = (
            "they are read as stored where that has the annotated size, as the COCO API does, else as viewers show them"
        )
    return observe_worst(
        f"pictures of {role} are turned or mirrored by EXIF",
        np.where(prints.orientations != 1, 0.0, np.nan),
        lambda a: f"{split.annotations.file_name(int(prints.indices[a]))} has orientation {prints.orientations[a]}",
        f"{used}; --view shows what the model sees",
    )


def _look_for_empty(role: str, split: Split, prints: Fingerprints) -> list[Observation]:
    """Look for pictures that are black, white or of one grey level as the model gets them."""
    low, high = prints.levels.astype(np.float64).T
    is_black, is_white = high < BLACK, low > WHITE
    is_flat = ~is_black & ~is_white & (high - low <= FLAT)

    def shown(a: int) -> str:
        return f"{split.annotations.file_name(int(prints.indices[a]))} has levels {low[a]:.0f} to {high[a]:.0f} of 255"

    advice = "nothing can be learned from them; look at them, and replace or remove them"
    return [
        observation
        for what, chosen, badness in (
            ("black", is_black, -high),
            ("white", is_white, low),
            ("flat: all of one grey level", is_flat, low - high),
        )
        for observation in observe_worst(
            f"pictures of {role} are {what} as the model gets them", np.where(chosen, badness, np.nan), shown, advice
        )
    ]


def look_at_objects(
    data: Data, spec: ModelSpec, images: dict[str, np.ndarray], *, writes_corners: bool
) -> tuple[list[Observation], dict[str, list[str]]]:
    """Look at the annotations of both splits through the eyes of a model.

    Args:
        data: Both splits.
        spec: The model.
        images: Which images count in the roles ``train`` and ``val``, int64.
        writes_corners: Whether the files have corners instead of width and height.

    Returns:
        (observations, lines of facts per role; keypoints under ``keypoints``).
    """
    parts = {
        role: SplitObjects.of(role, split, images[role], writes_corners)
        for role, split in (("train", data.train), ("val", data.val))
        if split is not None
    }
    grids = AnchorGrids(build_skeleton_model(spec))
    is_fixed = spec.architecture.fixed_size is not None
    seen: list[Observation] = []
    facts: dict[str, list[str]] = {}
    for role, part in parts.items():
        resized = resize_objects(grids.model, part.boxes, part.sizes[:, 1], part.sizes[:, 0])
        reach = reach_of_anchors(grids, resized)
        advice = suggest_anchors(spec, grids, resized, reach) if role == "train" else None
        facts[role] = format_split(part) + format_sizes(resized, reach, advice)
        of_part = check_box_format(part)
        of_part += check_repeated_objects(part)
        of_part += check_segmentations_against_boxes(part)
        of_part += check_keypoint_labels(part) if spec.num_keypoints else []
        of_part += check_sizes(part, resized, reach, advice, is_fixed) if role == "train" else []
        seen += [replace(one, title=f"{role}: {one.title}") for one in of_part]
    if spec.num_keypoints:
        facts["keypoints"] = format_keypoints(list(parts.values()))
    return seen + check_classes(parts.get("train"), parts["val"]), facts
