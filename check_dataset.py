"""Look over a dataset before training on it: what training would refuse, and what would make it worse.

    python check_dataset.py --dataset custom --data-path custom --model keypointrcnn_resnet50_fpn
    python check_dataset.py --dataset coco --data-path /data/coco --model fcos_resnet50_fpn --view 16

The flags are those of train.py. Errors are those that training would stop at; exit code 0 means that it may start.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

from coco_utils import write_coco
from flag_checks import check_data_args
from flags import add_data_flags, add_model_choice, data_source, keeps_negatives, wanted_spec
from inspection.diagnosis import Trial, check_pictures, look_at_objects, look_at_pictures, try_training_data
from inspection.observations import (
    Observation,
    format_facts,
    format_observations,
    group_findings,
    group_warnings,
)
from inspection.sample_sheets import write_sheets
from loading.loaders import DeviceLoader, build_train_loader
from loading.samples import ImageFolder
from loading.split import Split, implied_pairs
from loading.splits import DATASETS, Data
from loading.trainable import check_against_model, vanishing_images
from loading.training_images import training_indices
from models.architectures import ARCHITECTURES, ModelSpec
from pixels.image_files import examples
from pixels.images import read_header
from process.device import choose_device
from utils import Distributed, HelpFormatter, run_command


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description="Look over a dataset before training on it",
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("check")
    group.add_argument(
        "--images", action=argparse.BooleanOptionalAction, default=True, help="decode images and look for copies"
    )
    group.add_argument(
        "--view", default=0, type=int, metavar="N", help="draw N samples as annotated and as augmented; 0: none"
    )
    group.add_argument("--output-dir", default="runs/check", metavar="DIR", help="write --view's pictures here")
    group.add_argument(
        "--write-coco",
        metavar="DIR",
        help="write both splits as COCO json files into this folder",
    )
    group.add_argument("--seed", default=0, type=int, help="draw samples and their augmentation from this number")
    add_data_flags(parser)
    add_model_choice(parser.add_argument_group("model"))
    parser.set_defaults(max_dets=None, rpn_score_thresh=None)
    return parser


def build_training(args: argparse.Namespace, data: Data) -> tuple[ModelSpec, DeviceLoader]:
    """Return the model's record and the loader that training would use."""
    spec = wanted_spec(args, data)
    data = check_against_model(data, spec, args.on_bad_data)
    loader, _ = build_train_loader(
        data,
        spec,
        Distributed(0, 0, 1, choose_device("cpu")),
        batch_size=args.batch_size,
        workers=0,
        seed=args.seed,
        augmentation=args.data_augmentation,
        copy_paste=args.use_copypaste,
        group_factor=args.aspect_ratio_group_factor,
        keep_negatives=keeps_negatives(args),
        repeat_threshold=args.repeat_threshold,
    )
    return spec, loader


def main(args: argparse.Namespace) -> int:
    """Check, print, and return 0 where training may start."""
    # What training says
    source, task = data_source(args), ARCHITECTURES[args.model].task
    trial, built = try_training_data(source, task, lambda data: build_training(args, data))
    data = trial.data

    # What it does not look at
    warnings: list[Observation] = []
    facts: dict[str, list[str]] = {}
    if data is not None:
        splits = {role: split for role, split in (("train", data.train), ("val", data.val)) if split is not None}
        images = {role: split.indices for role, split in splits.items()}
        notes: list[str] = []
        if args.images:
            images = {role: check_pictures(split, trial, source, args.workers or 1) for role, split in splits.items()}
            warnings, notes = look_at_pictures(data, images, source, args.workers or 1)
        if data.train is not None:
            kept = training_indices(
                data.train, keep_negatives=keeps_negatives(args), needs_keypoints=task == "keypoint"
            )
            images["train"] = np.intersect1d(images["train"], kept)
        spec = wanted_spec(args, data)
        for role, split in splits.items():
            images[role] = np.setdiff1d(images[role], vanishing_images(split.annotations, spec))
        seen, facts = look_at_objects(data, spec, images, writes_corners=source.kind.has_own_json)
        warnings += seen
        facts["notes"] = notes

    # The report
    print(format_report(args, trial, warnings, facts))
    if args.view and built is not None and data is not None and data.train is not None:
        paths = write_sheets(
            Path(args.output_dir), data.train, built[1], args.view, preset=args.data_augmentation, seed=args.seed
        )
        print(f"samples as annotated: {paths[0]}; as {args.data_augmentation} augments them: {paths[1]}")
    elif args.view:
        print("--view: no samples are drawn where training would stop at errors; mend them, or --on-bad-data skip")
    if args.write_coco and trial.errors:
        print("--write-coco: nothing is written where training would stop at errors; mend them, or --on-bad-data skip")
    elif args.write_coco and data is not None:
        print("\n".join(write_splits(Path(args.write_coco), data, keeps_negatives(args))))
    return 1 if trial.errors else 0


def write_splits(folder: Path, data: Data, keep_negatives: bool) -> list[str]:
    """Write ``train.json`` and ``val.json`` into ``folder``; returns lines that say how to use them.

    Pictures are not copied: file names are relative to the folder that the lines name. Pictures that cannot be used are
    left out.

    Args:
        folder: Where to; it is made if need be.
        data: The splits.
        keep_negatives: Whether pictures without objects are trained on: COCO's are not unless a flag says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    flags: list[str] = []
    for role, split in (("train", data.train), ("val", data.val)):
        if split is None:
            continue
        path = folder / f"{role}.json"
        write_coco(split.annotations, path, split.indices)
        lines.append(f"{path}: {len(split.indices)} pictures of {split.name}")
        if isinstance(split.images, ImageFolder):
            lines[-1] += f"; file_name is relative to {split.images.root}"
            given = [f"--{role}-images", str(split.images.root), f"--{role}-annotations", str(path)]
            flags += map(shlex.quote, given)
            turned = unsaid_turns(split)
            if turned:
                problem = f"{len(turned)} picture(s) are turned by EXIF without a change of size: {examples(turned)}"
                lines.append(f"warning: {problem}; who reads COCO files takes them unturned: save them turned")
    if flags:
        kind = "coco_kp" if data.num_keypoints else "coco"
        if keep_negatives and not DATASETS[kind].keeps_negatives:
            flags.append("--keep-negatives")
        if data.sigmas is not None:  # they are not in COCO files, and neither is the mirror map
            flags += ["--kpt-oks-sigmas", *map(str, data.sigmas.tolist())]
            skeleton = (data.train or data.val).skeleton
            if skeleton.flip_pairs not in (None, implied_pairs(skeleton.names)):
                lines.append("warning: COCO files cannot say which keypoints swap: that training mirrors no picture")
        lines.append(f"to train on them: --dataset {kind} {' '.join(flags)}")
    return lines


def unsaid_turns(split: Split) -> list[str]:
    """Return the pictures whose EXIF rotation the size in a COCO file cannot say, where annotations follow EXIF."""
    if not isinstance(split.images, ImageFolder) or not split.images.apply_exif:
        return []
    names = map(split.annotations.file_name, split.indices.tolist())
    headers = ((name, read_header(split.images.root / name)) for name in names)
    return [name for name, h in headers if h.orientation != 1 and (h.height, h.width) == h.shown_size]


def format_report(
    args: argparse.Namespace, trial: Trial, warnings: list[Observation], facts: dict[str, list[str]]
) -> str:
    """Return all of it as text: the data, errors, warnings, and whether training may start."""
    lines = [f"dataset {args.dataset} for {args.model}", ""]
    if trial.data is not None:
        for role, split in (("train", trial.data.train), ("val", trial.data.val)):
            if split is not None:
                lines += [f"{role}: {split.name}", *format_facts(facts[role], "  "), ""]
        if "keypoints" in facts:
            lines += ["keypoints, labelled and visible on so many of the objects", *facts["keypoints"], ""]
        lines += [*format_facts([*trial.info, *facts["notes"]]), ""]
    errors = group_findings(trial.errors)
    warnings = [*group_warnings(trial.warnings), *warnings]
    if errors:
        lines += ["ERRORS", format_observations(errors), ""]
    if warnings:
        lines += ["WARNINGS", format_observations(warnings), ""]
    if trial.errors:
        verdict = f"{len(trial.errors)} error(s), {len(warnings)} warning(s): training would stop at the errors"
    else:
        verdict = f"no errors, {len(warnings)} warning(s): training may start"
    return "\n".join([*lines, verdict if args.images else verdict + " (images were not opened)"])


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_data_args(parser, args)
    if args.view < 0:
        parser.error(f"--view {args.view}: must not be negative")
    return run_command("check_dataset.py", main, args)


if __name__ == "__main__":
    sys.exit(run())
