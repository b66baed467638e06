"""Write a trained model as ONNX or TorchScript, and prove that the file gives what PyTorch gives.

    python export.py --checkpoint runs/first/weights/best.pth --format onnx
    python export.py --checkpoint best.pth --format torchscript --images photos/ --output model.torchscript

The exported model takes one picture, float32 [3, H, W], RGB in 0..1, of any size, and gives the outputs of the
PyTorch model by name. The file is run on pictures before it gets its name: where it disagrees, there is no file.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

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
from inference.picture_files import find_images, reject_or_batch
from inference.trained_model import TrainedModel, load_trained_model, settle_brightness
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from loading.splits import Source
from models.architectures import ModelSpec
from pixels.images import BadImageError, read_image
from utils import HelpFormatter, run_command, versions

logger = logging.getLogger("export")

FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript"}
ONNX_OPSET = 17
NUM_PICTURES = 6

# How far an exported model may be off, in words.
TOLERANCES = f"{BOX_TOLERANCE} px, {SCORE_TOLERANCE} of a score, {MASK_TOLERANCE:.0%} of a mask"

Picture = tuple[str, Tensor]
Runner = Callable[[Tensor], Outputs]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(description="Export a trained model and check it", formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="export the model in this file of train.py")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="write the model in this format")
    parser.add_argument(
        "--output", metavar="FILE", help="write to this file; default: the checkpoint's name with another suffix"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="compare file and model on these pictures, folders or globs; default: some of the dataset, or drawn ones",
    )
    return parser


class OnePicture(nn.Module):
    """A detector that takes one picture and gives one dict, in PyTorch and in TorchScript."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the detections of ``image``, float32 [3, H, W] in 0..1."""
        outputs = self.model([image])
        if torch.jit.is_scripting():
            return outputs[1][0]  # scripted detectors return (losses, detections)
        else:  # noqa: RET505 - TorchScript leaves out a branch, not what follows a return
            return outputs[0]


class InOrder(nn.Module):
    """The same with its outputs as a tuple, as tracing wants them."""

    def __init__(self, model: OnePicture, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of ``names``."""
        outputs = self.model(image)
        return tuple(outputs[name] for name in self.names)


class ScriptedResize(GeneralizedRCNNTransform):
    """Resizes to the sizes that torchvision has in PyTorch.

    torchvision's own code computes the scale in float32 when it is scripted or traced, in float64 otherwise: some
    pictures (427 pixels to 160, say) come out a pixel smaller, and all boxes a little elsewhere.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return ``image`` resized; targets are for training."""
        height, width = image.shape[-2:]
        short, long = float(min(height, width)), float(max(height, width))
        scale = min(float(self.min_size[-1]) / short, float(self.max_size) / long)
        size = [int(math.floor(height * scale)), int(math.floor(width * scale))]
        return nnf.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], target


class TracedResize(GeneralizedRCNNTransform):
    """The same, in tensors, so that a trace keeps the picture's size variable."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return ``image`` resized; targets are for training."""
        height, width = resized_shape(torch._shape_as_tensor(image)[-2:], self.min_size[-1], self.max_size)
        resized = nnf.interpolate(image[None], size=[height, width], mode="bilinear", align_corners=False)[0]
        return resized, target


def resized_shape(shape: Tensor, min_size: int, max_size: int) -> Tensor:
    """Return (height, width) int64 [2] after the model's resize, of ``shape`` int64 [2].

    Division by a tensor of one's own: ``number / tensor`` is ``number * (1 / tensor)`` in torch, which rounds twice.
    """
    sides = shape.to(torch.float64)
    limits = torch.tensor([min_size, max_size], dtype=torch.float64)
    scale = (limits / torch.stack([sides.min(), sides.max()])).min()
    return (sides * scale).floor().to(torch.int64)


def exportable(model: nn.Module, spec: ModelSpec, to_format: str) -> OnePicture:
    """Return a copy of a detector that has PyTorch's sizes when it is scripted or traced."""
    copied = copy.deepcopy(model)
    if spec.architecture.fixed_size is None:
        transform: Any = copied.transform
        transform.__class__ = TracedResize if to_format == "onnx" else ScriptedResize
    return OnePicture(copied).eval()


def dataset_pictures(flags: Mapping[str, Any]) -> list[Path]:
    """Return some pictures that a training with these flags was scored on; empty where they are not here.

    Where they were held out, they are some of all its pictures.
    """
    role = "train" if flags.get("val_fraction") else "val"
    paths = {role: (flags.get(f"{role}_images"), flags.get(f"{role}_annotations"))}
    source = Source(str(flags.get("dataset")), Path(str(flags.get("data_path"))), paths=paths)
    try:
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
        drawer, annotations = ShapeDrawer("val"), shapes_annotations("val", NUM_PICTURES)
        pixels = [(f"drawn picture {n}", drawer.read(annotations, n)) for n in range(NUM_PICTURES)]
    pixels.append((f"{pixels[0][0]}, turned", np.rot90(pixels[0][1])))
    return [
        (name, torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).mul(1 / 255).contiguous())
        for name, image in pixels
    ]


def need(*names: str) -> Any:
    """Import optional libraries and return the last of them.

    Raises:
        ValueError: One is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        raise ValueError(
            f"--format onnx needs {' and '.join(names)} ({error}): pip install {' '.join(names)}"
        ) from None


def write_torchscript(model: OnePicture, path: Path, metadata: dict[str, Any]) -> None:
    """Script the model and write it, with ``metadata.json`` inside."""
    scripted = torch.jit.script(model)
    content = io.BytesIO()  # torch's own writer ends the process when the disk is full
    torch.jit.save(scripted, content, _extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(content.getbuffer())


def run_torchscript(path: Path) -> Runner:
    """Load a TorchScript file and return a function from picture to outputs."""
    loaded = torch.jit.load(str(path), map_location="cpu")
    return lambda image: {name: value.numpy() for name, value in loaded(image).items()}


def write_onnx(model: OnePicture, path: Path, metadata: dict[str, Any], example: Tensor, names: list[str]) -> None:
    """Trace the model on ``example`` and write it, with the metadata as properties of the file.

    The tracing exporter is used: torchvision's detectors carry the code that keeps picture sizes and numbers of
    detections variable in a trace.
    """
    onnx = need("onnx")
    torch.onnx.export(
        InOrder(model, names).eval(),  # the exporter would put its parts into training mode afterwards
        (example,),
        str(path),
        input_names=["image"],
        output_names=names,
        dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}},
        opset_version=ONNX_OPSET,
        dynamo=False,
    )
    content = onnx.load(str(path))
    onnx.helper.set_model_props(content, {name: json.dumps(value) for name, value in metadata.items()})
    path.write_bytes(content.SerializeToString())


def run_onnx(path: Path, names: list[str]) -> Runner:
    """Open an ONNX file with onnxruntime and return a function from picture to outputs."""
    runtime = need("onnx", "onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: dict(zip(names, session.run(names, {"image": image.numpy()})))


def build_metadata(trained: TrainedModel) -> dict[str, Any]:
    """Return what a user of the exported file needs to know, as plain values."""
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
        "input": "image: float32 [3, height, width], RGB, 0..1, upright, any size; the model resizes and normalises",
        "resized_to": size,
        "value_range": {
            **trained.value_range.to_plain(),
            "meaning": "values that were black and white in training, for pictures with more than 8 bits a channel, of "
            "whole and of floating-point numbers; scale such values to 0..1 by them, and cut what is beyond",
        },
        "boxes": "float32 [detections, 4]: x1, y1, x2, y2 in pixels of the picture",
        "keypoint_names": list(trained.keypoint_names),
        "skeleton": [list(link) for link in trained.skeleton.links],
        "score_threshold": trained.score_threshold,
        "versions": versions(),
    }


def all_candidates(model: OnePicture, image: Tensor) -> Outputs:
    """Return what the model finds before it suppresses what overlaps."""
    with without_suppression(model.model):
        return {key: value.numpy() for key, value in model(image).items()}


def check_file(model: OnePicture, exported: Runner, pictures: list[Picture]) -> Agreement:
    """Run both on all pictures.

    Raises:
        ValueError: They do not agree, or there was nothing to compare; the text has the largest differences.
    """
    agreement = Agreement()
    refused: list[str] = []
    for name, image in pictures:
        expected = {key: value.numpy() for key, value in model(image).items() if key != "keypoints_scores"}
        try:
            found = exported(image)
        except Exception as error:  # a runtime raises what it likes
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name}: the exported model fails: {text}") from error
        try:
            candidates = functools.partial(all_candidates, model, image)
            compare_outputs(expected, found, agreement, name, candidates, has_proposals=hasattr(model.model, "rpn"))
        except ValueError as error:
            refused.append(str(error))
    if refused:
        where = f"the exported model differs on {len(refused)} of {len(pictures)} pictures"
        raise ValueError(f"{where}: {refused[0]}. All pictures: {agreement} (allowed {TOLERANCES})")
    if not agreement.detections:
        raise ValueError("no detection on any picture, so nothing was compared; give --images with objects")
    return agreement


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch says about its exporters to developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(args: argparse.Namespace) -> int:
    """Export, compare, and only then give the file its name."""
    output = Path(args.output) if args.output else Path(args.checkpoint).with_suffix(FORMATS[args.format])
    if output.exists():
        raise ValueError(f"--output {output}: exists already; remove it or choose another name")
    if args.format == "onnx":
        need("onnx", "onnxruntime")
    trained = load_trained_model(Path(args.checkpoint))
    pictures = load_pictures(args.images, trained)
    model = OnePicture(trained.model.requires_grad_(False)).eval()
    # Scores of single keypoints are not compared, hence left out where another runtime computes them.
    names = [name for name in model(pictures[0][1]) if name != "keypoints_scores"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(output) as temporary, quiet():
        try:
            exported_model = exportable(trained.model, trained.spec, args.format)
            if args.format == "onnx":
                write_onnx(exported_model, temporary, build_metadata(trained), pictures[0][1], names)
            else:
                write_torchscript(exported_model, temporary, build_metadata(trained))
        except Exception as error:  # exporters raise what they like
            if isinstance(error, (OSError, ValueError)):
                raise
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{trained.spec.name} cannot be exported to {args.format}: {text}") from error
        exported = run_onnx(temporary, names) if args.format == "onnx" else run_torchscript(temporary)
        agreement = check_file(model, exported, pictures)
    text = "%s: agrees with PyTorch on %d pictures (%s, ...): %s (allowed %s)"
    logger.info(text, output, len(pictures), pictures[0][0], agreement, TOLERANCES)
    return 0


def run(argv: list[str] | None = None) -> int:
    """Parse flags and run `main`; expected errors become one line and exit code 1."""
    args = get_args_parser().parse_args(argv)
    return run_command("export.py", main, args, aftermath="; nothing was written", stopped="; nothing was written")


if __name__ == "__main__":
    sys.exit(run())
