"""Write a trained model as ONNX, torch.export's pt2 or TorchScript, and prove that the file gives what PyTorch gives.

    python export.py --checkpoint runs/first/weights/best.pth --format onnx
    python export.py --checkpoint best.pth --format pt2 --size 480 640 --images photos/ --output model.pt2

ONNX and pt2 take a batch, float32 [B, 3, H, W], RGB in 0..1, and give the outputs of the PyTorch model by name, and how
many of each picture's slots are filled; TorchScript takes one picture, float32 [3, H, W]. The file is run on pictures
before it gets its name: where it disagrees, there is no file.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from files import write_aside
from inference.compare_outputs import (
    BOX_TOLERANCE,
    MASK_TOLERANCE,
    SCORE_TOLERANCE,
    Agreement,
    Outputs,
    compare_outputs,
    without_suppression,
)
from inference.export_formats import (
    SUFFIXES,
    OnePicture,
    Runner,
    follow,
    need_onnx,
    run_onnx,
    run_pt2,
    run_torchscript,
    why_not,
    write_onnx,
    write_pt2,
    write_torchscript,
    write_traced_onnx,
)
from inference.picture_files import find_images, reject_or_batch
from inference.trained_model import TrainedModel, load_trained_model, settle_brightness
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from loading.splits import Source, root_of
from models.export_form import OUTPUTS, SMALLEST_SIDE
from pixels.images import BadImageError, read_image
from utils import HelpFormatter, run_command, versions

logger = logging.getLogger("export")

NUM_PICTURES = 6

# How far an exported model may be off, in words.
TOLERANCES = f"{BOX_TOLERANCE} px, {SCORE_TOLERANCE} of a score, {MASK_TOLERANCE:.0%} of a mask"

Picture = tuple[str, Tensor]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(description="Export a trained model and check it", formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="export the model in this file of train.py")
    parser.add_argument("--format", required=True, choices=sorted(SUFFIXES), help="write the model in this format")
    parser.add_argument(
        "--output", metavar="FILE", help="write to this file; default: the checkpoint's name with another suffix"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="take one picture of this height and width, with outputs of fixed shapes; default: any size and batch",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="compare file and model on these pictures, folders or globs; default: some of the dataset, or drawn ones",
    )
    return parser


def dataset_pictures(flags: Mapping[str, Any]) -> list[Path]:
    """Return some pictures that a training with these flags was scored on; empty where they are not here.

    Where they were held out, they are some of all its pictures.
    """
    role = "train" if flags.get("val_fraction") else "val"
    paths = {role: (flags.get(f"{role}_images"), flags.get(f"{role}_annotations"))}
    dataset = str(flags.get("dataset"))
    try:
        source = Source(dataset, root_of(dataset, str(flags.get("data_path"))), paths=paths)
        pictures = source.kind.pictures(source, role)
    except (KeyError, OSError, ValueError):
        return []
    return pictures[:: max(1, len(pictures) // (2 * NUM_PICTURES))]


def load_pictures(paths: list[str] | None, trained: TrainedModel) -> list[Picture]:
    """Return (name, float32 [3, H, W] in 0..1) of every picture, and of the first one turned by a quarter.

    The turned one has another shape: an export that has the first picture's size built in is found out.

    Args:
        paths: Pictures to compare on; without any, some of the dataset that the model was trained on, else drawn ones.
        trained: Knows the dataset, and which pictures the model can use.
    """
    files = find_images(paths) if paths else dataset_pictures(trained.flags)
    batches, bad = reject_or_batch(files, max(1, len(files)), trained.spec)
    for file in bad if paths else ():
        logger.warning("skipped: %s: %s", files[file.index], file.reason)
    chosen = [files[index] for batch in batches for index in batch][: None if paths else NUM_PICTURES]
    if paths and not chosen:
        raise ValueError(f"--images {' '.join(paths)}: the model can use none of these pictures")
    value_range = settle_brightness(trained, chosen).value_range
    pixels: list[tuple[str, np.ndarray]] = []
    for path in chosen:
        try:
            pixels.append((str(path), read_image(path, value_range=value_range)))
        except BadImageError:
            if paths:
                raise
    if not pixels:
        logger.info("none of the training's own pictures is here: drawn shapes are compared; --images takes others")
        drawer, annotations = ShapeDrawer("val"), shapes_annotations("val", NUM_PICTURES)
        pixels = [(f"drawn picture {n}", drawer.read(annotations, n)) for n in range(NUM_PICTURES)]
    pixels.append((f"{pixels[0][0]}, turned", np.rot90(pixels[0][1])))
    return [
        (name, torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).mul(1 / 255).contiguous())
        for name, image in pixels
    ]


@dataclass(frozen=True)
class Case:
    """Pictures of one size, and what PyTorch finds in each.

    Attributes:
        name: Names the pictures in errors.
        images: float32 [B, 3, H, W].
        expected: The outputs that are compared, one dict for each picture.
    """

    name: str
    images: Tensor
    expected: list[Outputs]


def build_cases(model: OnePicture, pictures: list[Picture]) -> list[Case]:
    """Run the model: on every picture alone, and on the first one beside its mirror image, as a batch.

    Raises:
        ValueError: It finds nothing in any of them.
    """
    batches = [(name, image[None]) for name, image in pictures]
    name, image = pictures[0]
    batches.append((f"{name} and its mirror image", torch.stack([image, image.flip(-1)])))
    cases = [Case(name, images, [_without_heat(model(image)) for image in images]) for name, images in batches]
    if not any(len(outputs["scores"]) for case in cases for outputs in case.expected):
        raise ValueError("no detection on any picture, so nothing was compared; give --images with objects")
    return cases


def _without_heat(outputs: Mapping[str, Tensor]) -> Outputs:
    """Return outputs as arrays; scores of single keypoints are not compared, hence left out where that is possible."""
    return {key: value.numpy() for key, value in outputs.items() if key != "keypoints_scores"}


def build_metadata(trained: TrainedModel, shape: str, outputs: str) -> dict[str, Any]:
    """Return what a user of the exported file needs to know, as plain values.

    Args:
        trained: The model and what its outputs mean.
        shape: What the file takes, without type and values.
        outputs: In what shape every output begins.
    """
    spec, labels = trained.spec, trained.label_map
    architecture = spec.architecture
    size: dict[str, Any] = {
        "min_size": spec.min_size[-1] if spec.min_size else architecture.min_size,
        "max_size": spec.max_size or architecture.max_size,
    }
    if architecture.fixed_size is not None:
        size = {"height": architecture.fixed_size[0], "width": architecture.fixed_size[1]}
    texts = dict(labels.id_texts)
    classes = [
        {"label": label, "name": name, "category_id": texts.get(id_, id_)}
        for label, (id_, name) in enumerate(zip(labels.category_ids, labels.names), start=1)
        if id_ >= 0
    ]
    return {
        "model": spec.name,
        "classes": classes,
        "input": f"{shape}, float32, RGB, 0..1, upright; the model resizes and normalises",
        "resized_to": size,
        "value_range": {
            **trained.value_range.to_plain(),
            "meaning": "values that were black and white in training, for pictures with more than 8 bits a channel, of "
            "whole and of floating-point numbers; scale such values to 0..1 by them, and cut what is beyond",
        },
        "boxes": f"float32 [{outputs}, 4]: x1, y1, x2, y2 in pixels of the picture",
        "keypoint_names": list(trained.keypoint_names),
        "skeleton": [list(link) for link in trained.skeleton.links],
        "score_threshold": trained.score_threshold,
        "versions": versions(),
    }


def all_candidates(model: OnePicture, image: Tensor) -> Outputs:
    """Return what the model finds before it suppresses what overlaps."""
    with without_suppression(model.model):
        return {key: value.numpy() for key, value in model(image).items()}


def check_file(model: OnePicture, exported: Runner, cases: list[Case]) -> Agreement:
    """Run the exported model on all cases.

    Raises:
        ValueError: It gives something else; the text has the largest differences.
    """
    agreement = Agreement()
    refused: list[str] = []
    has_proposals = hasattr(model.model, "rpn")
    for case in cases:
        try:
            found = exported(case.images)
        except Exception as error:  # a runtime raises what it likes
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{case.name}: the exported model fails: {text}") from error
        for image, expected, outputs in zip(case.images, case.expected, found, strict=True):
            agreement.pictures += 1
            candidates = functools.partial(all_candidates, model, image)
            try:
                compare_outputs(expected, outputs, agreement, case.name, candidates, has_proposals=has_proposals)
            except ValueError as error:
                refused.append(str(error))
    if refused:
        where = f"the exported model differs on {len(refused)} of {agreement.pictures} pictures"
        raise ValueError(f"{where}: {refused[0]}. All pictures: {agreement.against_limits()}")
    if not agreement.detections:
        raise ValueError("no detection of the exported model has a partner in PyTorch, so nothing was compared")
    return agreement


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch says about its exporters to developers."""
    libraries = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [library.level for library in libraries]
    for library in libraries:
        library.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in zip(libraries, levels):
            library.setLevel(level)


@dataclass(frozen=True)
class Export:
    """What is exported, and what it is compared with.

    Attributes:
        trained: The model and what its outputs mean.
        cases: Single pictures, then a batch.
        size: The only (height, width) that the file is to take; None for any.
    """

    trained: TrainedModel
    cases: list[Case]
    size: tuple[int, int] | None

    @property
    def names(self) -> list[str]:
        """The outputs of a file that takes batches."""
        return [name for name in OUTPUTS if name in self.cases[0].expected[0] or name == "counts"]

    def to_pt2(self, path: Path) -> tuple[Runner, list[Case]]:
        """Write torch.export's file."""
        program, metadata, cases = self._followed()
        write_pt2(program, path, metadata)
        return run_pt2(path, self.names), cases

    def to_onnx(self, path: Path) -> tuple[Runner, list[Case]]:
        """Write ONNX with the exporter that goes by torch.export."""
        program, metadata, cases = self._followed()
        write_onnx(program, path, metadata, self.names)
        return run_onnx(path, self.names), cases

    def to_traced_onnx(self, path: Path) -> tuple[Runner, list[Case]]:
        """Write ONNX with the exporter that traces torchvision's own forward."""
        shape, outputs = "images: [1, 3, height, width], any size", "1, detections"
        metadata = build_metadata(self.trained, shape, outputs)
        write_traced_onnx(self.trained.model, path, metadata, self.cases[0].images, self.names)
        return run_onnx(path, self.names), self.cases[:-1]

    def to_torchscript(self, path: Path) -> tuple[Runner, list[Case]]:
        """Write TorchScript."""
        metadata = build_metadata(self.trained, "image: [3, height, width], any size", "detections")
        write_torchscript(self.trained.model, path, metadata)
        return run_torchscript(path), self.cases[:-1]

    def _followed(self) -> tuple[torch.export.ExportedProgram, dict[str, Any], list[Case]]:
        """Return the model as a graph, what its users need to know, and what it can be compared on."""
        cases = self.cases if self.size is None else self.cases[:-1]
        program = follow(self.trained.model, cases[-1].images, self.size is not None)
        batch, height, width = ("batch", "height", "width") if self.size is None else (1, *self.size)
        shape = f"images: [{batch}, 3, {height}, {width}]" + (
            "" if self.size else f", sides of {SMALLEST_SIDE} or more"
        )
        return program, build_metadata(self.trained, shape, f"{batch}, slots"), cases


# How to write each format, the best way first.
WAYS: dict[str, list[Callable[[Export, Path], tuple[Runner, list[Case]]]]] = {
    "onnx": [Export.to_onnx, Export.to_traced_onnx],
    "pt2": [Export.to_pt2],
    "torchscript": [Export.to_torchscript],
}


def write_checked(export: Export, to_format: str, path: Path) -> Agreement:
    """Write the file in the first way that passes; a warning says why another one is used.

    Raises:
        ValueError: None passes; the text says why.
    """
    model = OnePicture(export.trained.model).eval()
    ways = WAYS[to_format] if export.size is None else WAYS[to_format][:1]
    for number, write in enumerate(ways, start=1):
        try:
            runner, cases = write(export, path)
        except Exception as error:  # exporters raise what they like
            if isinstance(error, OSError):
                raise
            reason = f"{export.trained.spec.name} cannot be exported to {to_format}: {why_not(error)}"
        else:
            try:
                return check_file(model, runner, cases)
            except ValueError as error:
                reason = str(error)
        if number == len(ways):
            other = "" if to_format == "torchscript" else "; --format torchscript takes any model"
            raise ValueError(f"{reason}{other}")
        logger.warning("%s: written by the exporter that torch calls deprecated, for one picture at a time", reason)
    raise AssertionError(to_format)


def main(args: argparse.Namespace) -> int:
    """Export, compare, and only then give the file its name."""
    output = Path(args.output) if args.output else Path(args.checkpoint).with_suffix(SUFFIXES[args.format])
    if output.exists():
        raise ValueError(f"--output {output}: exists already; remove it or choose another name")
    size = tuple(args.size) if args.size else None
    if size and args.format == "torchscript":
        raise ValueError("--size goes with --format onnx and pt2; a TorchScript file takes any size")
    if size and min(size) < SMALLEST_SIDE:
        raise ValueError(f"--size {size[0]} {size[1]}: expected {SMALLEST_SIDE} pixels or more each")
    if args.format == "onnx":
        need_onnx()
    trained = load_trained_model(Path(args.checkpoint))
    trained.model.requires_grad_(False)
    pictures = load_pictures(args.images, trained)
    if size:
        pictures = [(name, nnf.interpolate(image[None], size, mode="bilinear")[0]) for name, image in pictures]
    cases = build_cases(OnePicture(trained.model).eval(), pictures)
    output.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(output) as temporary, quiet():
        agreement = write_checked(Export(trained, cases, size), args.format, temporary)
    text = "%s: agrees with PyTorch on %d pictures (%s, ...): %s (allowed %s)"
    logger.info(text, output, agreement.pictures, pictures[0][0], agreement, TOLERANCES)
    return 0


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    args = get_args_parser().parse_args(argv)
    return run_command("export.py", main, args, aftermath="; nothing was written", stopped="; nothing was written")


if __name__ == "__main__":
    sys.exit(run())
