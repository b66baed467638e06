"""From ``--dataset`` and its paths to the two splits of a run."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from annotations.arrays import Annotations, cached_annotations
from annotations.findings import Findings
from annotations.image_checks import check_decoding, check_files
from annotations.labels import LabelMap
from annotations.skeleton import (
    WHERE_PAIRS,
    Skeleton,
    check_flip_order,
    choose_sigmas,
    flip_order,
    infer_flip_pairs,
)
from coco_utils import read_coco
from custom_dataset import read_dataset_info, read_folder, why_no_split
from files import why_no_folder
from loading.brightness import dataset_value_range
from loading.holdout import Holdout, hold_out
from loading.samples import ImageFolder
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from loading.split import NoSplitError, Split, checked_split, implied_pairs, log_warnings
from loading.split_checks import check_names, warn_of_alike_names, warn_of_overlap, warn_of_unused
from loading.voc_dataset import load_voc_split, voc_pictures
from loading.yolo_dataset import load_yolo_split, yolo_pictures
from pixels.image_files import pictures_below
from pixels.value_range import ValueRange

logger = logging.getLogger(__name__)

# COCO's 80 classes by their ids 1 to 90; the ten gaps are called N/A.
COCO_NAMES = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])


@dataclass(frozen=True)
class CocoPaths:
    """Where a COCO-style split lies."""

    images: Path
    annotations: Path


def find_coco_paths(
    root: Path, role: str, dataset: str, images: str | None = None, annotations: str | None = None
) -> CocoPaths:
    """Return where the ``train`` or ``val`` split lies: as given, in COCO's layout, or as annotation tools export.

    Raises:
        NoSplitError: Nothing is there.
        FileNotFoundError: The annotations are there without their images, or flags name annotations that are not there.
    """
    kind = "person_keypoints" if dataset == "coco_kp" else "instances"
    export = root / ("train" if role == "train" else "valid")
    candidates = [
        CocoPaths(root / f"{role}2017", root / "annotations" / f"{kind}_{role}2017.json"),
        CocoPaths(export, export / "_annotations.coco.json"),
    ]
    if annotations is not None:
        candidates = [CocoPaths(Path(images) if images else Path(annotations).parent, Path(annotations))]
    for paths in candidates:
        if paths.annotations.is_file():
            if not paths.images.is_dir():
                raise FileNotFoundError(f"{paths.images}: {why_no_folder(paths.images)} (for {paths.annotations})")
            return paths
    tried = [str(paths.annotations) for paths in candidates]
    what = f"neither {' nor '.join(tried)} exists" if len(tried) > 1 else f"{tried[0]} does not exist"
    flags = f"--{role}-images and --{role}-annotations"
    error = NoSplitError if annotations is None else FileNotFoundError
    why = f" ({why_no_folder(root)})" if annotations is None and not root.is_dir() else ""
    remedy = f"set --data-path, or {flags}"
    if annotations is None and (root / "train" / "annotations").is_dir():
        remedy = "add --dataset custom, whose folders these look like"
    raise error(f"no {role} annotations: {what}{why}; {remedy}")


def load_coco_split(
    paths: CocoPaths, *, on_bad_data: str = "error", uses: Sequence[str] = (), cache_dir: Path | None = None
) -> Split:
    """Read a COCO-style split through the annotation cache and look for its image files."""
    annotations = cached_annotations(
        paths.annotations,
        lambda: read_coco(paths.annotations, on_bad_data=on_bad_data, uses=uses),
        cache_dir,
        options=f"{on_bad_data} {' '.join(uses)}",
    )
    skeleton = Skeleton(annotations.keypoint_names, annotations.skeleton, implied_pairs(annotations.keypoint_names))
    findings = Findings(on_bad_data)
    return checked_split(
        str(paths.annotations), annotations, ImageFolder(paths.images), skeleton, findings, cache_dir=cache_dir
    )


def load_custom_split(
    root: Path,
    role: str,
    *,
    on_bad_data: str = "error",
    uses: Sequence[str] = (),
    cache_dir: Path | None = None,
    classes: Sequence[str] = (),
) -> Split:
    """Read ``train`` or ``test`` (for the role ``val``) below ``root`` and decode every image once.

    Args:
        root: Folder of the dataset, with ``train``, ``test`` and perhaps ``dataset.json``.
        role: ``train`` or ``val``.
        on_bad_data: ``error`` or ``skip``.
        uses: What is learnt beside boxes, see `annotations_from_records`.
        cache_dir: Remembers which images decode.
        classes: Names of the labels, where ``dataset.json`` has none: those of the training split or checkpoint.

    Raises:
        NoSplitError: There is no such folder.
        BadDataError: What is wrong with the data, all findings at once.
    """
    folder = root / ("train" if role == "train" else "test")
    if not folder.exists():
        raise NoSplitError(why_no_split(folder, folder / "images"))
    findings = Findings(on_bad_data)
    info = read_dataset_info(root, findings, uses=uses)
    if not info.classes and classes:
        info = replace(info, classes=tuple(classes))
    annotations = read_folder(folder, info, on_bad_data=on_bad_data, uses=uses, findings=findings)
    findings = Findings(on_bad_data)
    check_files(annotations, folder, findings)
    missing = sorted(findings.dropped_images)
    present = np.setdiff1d(np.arange(len(annotations)), missing)
    check_decoding(annotations, folder, findings, apply_exif=True, cache_dir=cache_dir, indices=present)
    findings.raise_errors()
    log_warnings((*annotations.warnings, *findings.warnings()))
    count = annotations.num_keypoints
    links = tuple((a, b) for a, b in info.skeleton.links if 0 <= a < count and 0 <= b < count)
    skeleton = replace(info.skeleton, links=links)
    if skeleton.flip_pairs is None and skeleton.names:
        skeleton = Skeleton(skeleton.names, skeleton.links, implied_pairs(skeleton.names), skeleton.sigmas)
    indices = np.setdiff1d(np.arange(len(annotations)), sorted(findings.dropped_images))
    return Split(str(folder), annotations, ImageFolder(folder, apply_exif=True), indices, skeleton)


def load_shapes_split(role: str) -> Split:
    """Return the drawn dataset."""
    annotations = shapes_annotations(role)
    names = annotations.keypoint_names
    skeleton = Skeleton(names, annotations.skeleton, infer_flip_pairs(names))
    return Split(f"shapes ({role})", annotations, ShapeDrawer(role), np.arange(len(annotations)), skeleton)


# That of torchvision's scripts.
DEFAULT_DATA_PATH = "/datasets01/COCO/022719/"

# What a model learns beside boxes, by its task.
_USES: dict[str, tuple[str, ...]] = {"box": (), "mask": ("segm",), "keypoint": ("keypoints",)}


@dataclass(frozen=True)
class Source:
    """Which data a run uses, and how strictly.

    Attributes:
        dataset: One of `DATASETS`.
        root: ``--data-path``.
        on_bad_data: ``error`` or ``skip``.
        cache_dir: For annotation caches; None for the default.
        paths: (images, annotations) of the roles ``train`` and ``val`` where they are given explicitly.
        val_fraction: ``--val-fraction``: the share of the training pictures that is held out; None for none.
        seed: Decides with each picture's content whether it is held out.
    """

    dataset: str
    root: Path
    on_bad_data: str = "error"
    cache_dir: Path | None = None
    paths: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    val_fraction: float | None = None
    seed: int = 0

    def load(self, role: str, *, task: str, classes: Sequence[str] = ()) -> Split:
        """Read the split ``train`` or ``val``; ``task`` as in `load_data`, ``classes`` as in `load_custom_split`."""
        options: dict[str, Any] = {
            "on_bad_data": self.on_bad_data,
            "uses": _USES[task],
            "cache_dir": self.cache_dir,
        }
        return self.kind.load(self, role, classes, options)

    @property
    def kind(self) -> "DatasetKind":
        """What ``--dataset`` says of the files."""
        return DATASETS[self.dataset]


@dataclass(frozen=True)
class DatasetKind:
    """What one value of ``--dataset`` means.

    Attributes:
        load: Reads a split from the source, the role, the class names and the options of `Source.load`.
        pictures: Lists the pictures of a role without reading annotations; raises OSError or ValueError without any.
        has_coco_files: Whether a split is one annotation file and a folder of images, which flags may name.
        has_own_json: Whether every image has a json of its own, with boxes as corners.
        keeps_negatives: Whether images without objects are trained on unless ``--no-keep-negatives``.
        tasks: What models may learn from it: ``box``, ``mask``, ``keypoint``.
    """

    load: Callable[[Source, str, Sequence[str], dict[str, Any]], Split]
    pictures: Callable[[Source, str], list[Path]]
    has_coco_files: bool = False
    has_own_json: bool = False
    keeps_negatives: bool = False
    tasks: tuple[str, ...] = tuple(_USES)


def root_of(dataset: str, data_path: str) -> Path:
    """Return where ``--dataset`` and ``--data-path`` say that the files are."""
    is_default = DATASETS[dataset].has_own_json and data_path == DEFAULT_DATA_PATH
    return Path("custom" if is_default else data_path)


def _load_coco(source: Source, role: str, classes: Sequence[str], options: dict[str, Any]) -> Split:
    paths = find_coco_paths(source.root, role, source.dataset, *source.paths.get(role, (None, None)))
    return load_coco_split(paths, **options)


def _load_custom(source: Source, role: str, classes: Sequence[str], options: dict[str, Any]) -> Split:
    return load_custom_split(source.root, role, classes=classes, **options)


def _load_yolo(source: Source, role: str, classes: Sequence[str], options: dict[str, Any]) -> Split:
    return load_yolo_split(source.root, role, **options)


def _load_voc(source: Source, role: str, classes: Sequence[str], options: dict[str, Any]) -> Split:
    return load_voc_split(source.root, role, classes=classes, **options)


def _coco_pictures(source: Source, role: str) -> list[Path]:
    paths = find_coco_paths(source.root, role, source.dataset, *source.paths.get(role, (None, None)))
    return pictures_below(paths.images)


def _custom_pictures(source: Source, role: str) -> list[Path]:
    return pictures_below(source.root / ("train" if role == "train" else "test"))


DATASETS = {
    "coco": DatasetKind(_load_coco, _coco_pictures, has_coco_files=True, tasks=("box", "mask")),
    "coco_kp": DatasetKind(_load_coco, _coco_pictures, has_coco_files=True),
    "custom": DatasetKind(_load_custom, _custom_pictures, has_own_json=True, keeps_negatives=True),
    "yolo": DatasetKind(_load_yolo, lambda source, role: yolo_pictures(source.root, role), keeps_negatives=True),
    "voc": DatasetKind(
        _load_voc, lambda source, role: voc_pictures(source.root, role), keeps_negatives=True, tasks=("box",)
    ),
    "shapes": DatasetKind(
        lambda source, role, classes, options: load_shapes_split(role), lambda source, role: [], keeps_negatives=True
    ),
}


@dataclass(frozen=True)
class Data:
    """Both splits of a run and what the model must know of them.

    Attributes:
        train: None where only evaluation is wanted.
        val: What is scored.
        label_map: Labels of the model.
        flip_order: int64 [K], which keypoint takes whose place in a mirror; None where not known.
        sigmas: OKS sigmas, float64 [K]; None without keypoints.
        value_range: Which values are black and white, where a channel has more than 8 bits; the splits have it too.
        holdout: How ``val`` was held out of the training pictures; None where it was given.
    """

    train: Split | None
    val: Split
    label_map: LabelMap
    flip_order: np.ndarray | None = None
    sigmas: np.ndarray | None = None
    value_range: ValueRange = ValueRange()
    holdout: Holdout | None = None

    @property
    def num_keypoints(self) -> int:
        """Keypoints per object."""
        return (self.train or self.val).annotations.num_keypoints

    def fingerprint(self) -> str:
        """Return a hash of which images are trained and evaluated on and how bright, to compare between machines."""
        splits = [split for split in (self.train, self.val) if split is not None]
        digest = hashlib.sha256(b"".join(s.annotations.image_ids[s.indices].tobytes() for s in splits))
        digest.update(repr(self.value_range).encode())
        return digest.hexdigest()

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data, as plain values; `load_data` reads it."""
        skeleton = (self.train or self.val).skeleton
        return {
            **self.label_map.to_plain(),
            "keypoint_names": list(skeleton.names),
            "skeleton": [list(link) for link in skeleton.links],
            "sigmas": None if self.sigmas is None else self.sigmas.tolist(),
            "value_range": self.value_range.to_plain(),
            "holdout": None if self.holdout is None else self.holdout.to_plain(),
        }


def load_data(
    source: Source,
    task: str,
    *,
    sigmas: Sequence[float] | None = None,
    known: dict[str, Any] | None = None,
    test_only: bool = False,
) -> Data:
    """Read the splits, check them against each other, and settle labels, brightness, mirror map and OKS sigmas.

    Args:
        source: Which data.
        task: ``box``, ``mask`` or ``keypoint``: what the model learns.
        sigmas: ``--kpt-oks-sigmas``.
        known: `Data.to_plain` of a checkpoint that is continued or evaluated.
        test_only: Leave the training split alone.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: The data cannot be used; one line per finding.
    """
    holdout = Holdout.asked(source.val_fraction, source.seed, known)
    train, val, label_map = _load_splits(source, task, known=known, test_only=test_only, holds_out=holdout is not None)
    loaded = [split for split in (train, val) if split is not None]
    for split in loaded:
        if known is not None:
            check_names(split, known["label_categories"], known["label_names"], "the checkpoint")
    if train is not None and val is not None:
        check_names(val, label_map.category_ids, label_map.names, train.name)
    known_ids = set(label_map.category_ids)
    unknown = [name for id_, name in loaded[-1].annotations.categories if id_ not in known_ids]
    if unknown:
        logger.warning("classes that the model does not know count as missed: %s", ", ".join(unknown))
    warn_of_alike_names(loaded)
    if train is not None and not test_only:
        warn_of_unused(train, val or train)
    if train is not None and val is not None:
        warn_of_overlap(train, val)
    value_range = ValueRange() if known is None else ValueRange.from_plain(known.get("value_range"))
    parts = [(split.images, split.annotations, split.indices) for split in loaded]
    value_range = dataset_value_range(parts, value_range, loaded[0].name, source.cache_dir)
    train, val = (split and split.shown_in(value_range) for split in (train, val))
    if val is not None:
        holdout = None
    else:
        assert train is not None and holdout is not None
        if known is not None and not known.get("holdout"):
            logger.warning("the checkpoint held out no pictures: scores are too good where it was trained on these")
        train, val, holdout = hold_out(train, holdout, cache_dir=source.cache_dir)
    data = Data(None if test_only else train, val, label_map, value_range=value_range, holdout=holdout)
    return _with_keypoints(data, sigmas) if task == "keypoint" else data


def _load_splits(
    source: Source, task: str, *, known: dict[str, Any] | None, test_only: bool, holds_out: bool
) -> tuple[Split | None, Split | None, LabelMap]:
    """Return (training split, validation split, labels), the splits as the data have them.

    With ``test_only`` there is no training split. Where the data have no validation split and one ``holds_out``, there
    is a training split alone.
    """
    train = None
    label_map = None if known is None else LabelMap.from_plain(known)
    if not test_only:
        train = source.load("train", task=task, classes=tuple(known["label_names"]) if known else ())
        if not train.annotations.num_objects:
            raise ValueError(f"{train.name}: no objects to train on")
        label_map = label_map_for(train.annotations)
    names = () if label_map is None else label_map.class_names
    val = None
    try:
        val = source.load("val", task=task, classes=names)
    except NoSplitError as error:
        if not holds_out:
            advice = "or give --val-fraction 0.2 to hold out a fifth of the training pictures"
            raise FileNotFoundError(f"{error}; {advice}") from None
        train = train or source.load("train", task=task, classes=names)
    if val is not None and not len(val.indices):
        raise ValueError(f"{val.name}: no images to evaluate on")
    if val is not None and source.val_fraction is not None:
        raise ValueError(f"--val-fraction is for data without a validation split, and {val.name} is one: leave one out")
    first = train or val
    assert first is not None
    return train, val, label_map or label_map_for(first.annotations)


def _with_keypoints(data: Data, sigmas: Sequence[float] | None) -> Data:
    """Return the data with the mirror map and OKS sigmas of their keypoints; ``sigmas`` as in `load_data`."""
    train, val = data.train, data.val
    of_split = train or val
    num_keypoints = of_split.annotations.num_keypoints
    if not num_keypoints:
        raise ValueError(f"{of_split.name}: no keypoints, but the model learns them")
    if val.annotations.num_keypoints not in (0, num_keypoints):
        found = val.annotations.num_keypoints
        raise ValueError(f"{val.name}: {found} keypoints per object, {of_split.name} has {num_keypoints}")
    values, origin = choose_sigmas(sigmas, of_split.skeleton, num_keypoints)
    logger.info("OKS sigmas from %s: %s", origin, " ".join(f"{s:g}" for s in values))
    return replace(data, flip_order=None if train is None else _proven_flip_order(train), sigmas=values)


def _proven_flip_order(split: Split) -> np.ndarray | None:
    """Return the mirror map of the split's keypoints after checking it on the labels, or None where not known."""
    pairs, annotations = split.skeleton.flip_pairs, split.annotations
    if pairs is None:
        logger.info(
            "no mirroring in training: which keypoints swap is not known; give names with left and right, or "
            "flip_pairs ([] only if no keypoint has a left or right partner) in %s",
            WHERE_PAIRS,
        )
        return None
    order = flip_order(pairs, annotations.num_keypoints)
    try:
        check_flip_order(order, annotations.keypoints, annotations.boxes_xywh)
    except ValueError as error:
        raise ValueError(f"{split.name}: {error}") from None
    names = split.skeleton.names or tuple(map(str, range(annotations.num_keypoints)))
    logger.info("keypoints that swap in a mirror: %s", ", ".join(f"{names[a]}-{names[b]}" for a, b in pairs) or "none")
    return order


def label_map_for(annotations: Annotations) -> LabelMap:
    """Return the model's labels: COCO's category ids for COCO's classes, 1 to C for any others.

    COCO's ids keep their gaps (91 labels with background), so that torchvision's weights fit.
    """
    is_coco = all(0 < id_ < len(COCO_NAMES) and COCO_NAMES[id_] == name for id_, name in annotations.categories)
    if is_coco and len(annotations.categories) > 1:
        known = {id_ for id_, _ in annotations.categories}
        ids = tuple(id_ if id_ in known else -1 for id_ in range(1, len(COCO_NAMES)))
        return LabelMap(ids, COCO_NAMES[1:])
    return LabelMap.contiguous(annotations.categories, annotations.id_texts)
