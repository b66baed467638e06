"""The files that a detector is exported to: how each is written, and how it is run again to be compared."""

import contextlib
import copy
import importlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from inference.compare_outputs import Outputs
from models.export_form import SMALLEST_SIDE, resized_shape
from models.rcnn_export_form import export_form

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".torchscript"}
OPSET, OLD_OPSET = 18, 17  # the oldest that each exporter writes without a conversion

# From a batch, float32 [B, 3, H, W] in 0..1, to the outputs of every picture.
Runner = Callable[[Tensor], list[Outputs]]


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


class BatchOfOne(nn.Module):
    """torchvision's own forward with the inputs and outputs of an `export_form`, for a batch of one picture."""

    def __init__(self, model: OnePicture, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of ``names``, and their number, for ``images``, float32 [1, 3, H, W]."""
        outputs = self.model(images[0])
        counts = torch._shape_as_tensor(outputs["scores"])[:1]
        return tuple(counts if name == "counts" else outputs[name][None] for name in self.names)


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


def with_resize(model: nn.Module, resize: type[GeneralizedRCNNTransform]) -> OnePicture:
    """Return a copy of a detector that has PyTorch's sizes when it is scripted or traced."""
    copied = copy.deepcopy(model)
    transform: Any = copied.transform
    if transform.fixed_size is None:
        transform.__class__ = resize
    return OnePicture(copied).eval()


def need(what: str, *names: str) -> Any:
    """Import optional libraries and return the last of them.

    Raises:
        ValueError: One is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        listed = ", ".join(names[:-1]) + f" and {names[-1]}"
        raise ValueError(f"{what} needs {listed} ({error}): pip install {' '.join(names)}") from None


def need_onnx() -> Any:
    """Return onnxruntime; raises ValueError where it, or what the exporters need, is not installed."""
    return need("--format onnx", "onnx", "onnxscript", "onnxruntime")


def follow(model: nn.Module, example: Tensor, is_fixed: bool) -> torch.export.ExportedProgram:
    """Return a detector as a graph of tensors, its sizes variable unless ``is_fixed``.

    Args:
        model: One of torchvision's detectors, in evaluation mode.
        example: float32 [B, 3, H, W]; two pictures where the batch is to stay variable.
        is_fixed: Whether only batches of the example's shape are to be taken.
    """
    form, example = export_form(model), example.contiguous()  # the strides of a slice would become conditions
    sides = {0: torch.export.Dim("batch")}
    sides |= {axis: torch.export.Dim(name, min=SMALLEST_SIDE) for axis, name in ((2, "height"), (3, "width"))}
    # Where it fails, torch prints all that it followed so far, a thousand lines.
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        program = torch.export.export(form, (example,), dynamic_shapes=None if is_fixed else (sides,))
    program.example_inputs = None  # its file would have the pictures in it
    return program


def write_pt2(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write a graph as torch.export's file, with ``metadata.json`` inside."""
    content = io.BytesIO()  # torch's own writer ends the process when the disk is full
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(content.getbuffer())


def run_pt2(path: Path, names: Sequence[str]) -> Runner:
    """Load a file of `write_pt2` and return a function from batch to outputs."""
    run = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda images: split_slots(dict(zip(names, run(images))))


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any], names: Sequence[str]
) -> None:
    """Write a graph as ONNX, with the metadata as properties of the file."""
    onnx = need("--format onnx", "onnx", "onnxscript", "onnx")
    content = torch.onnx.export(
        program, input_names=["images"], output_names=list(names), opset_version=OPSET, verbose=False, dynamo=True
    )
    assert content is not None
    _save_onnx(onnx, content.model_proto, path, metadata)


def write_traced_onnx(
    model: nn.Module, path: Path, metadata: dict[str, Any], example: Tensor, names: Sequence[str]
) -> None:
    """Trace torchvision's own forward on ``example`` and write it as `write_onnx` does, for batches of one picture.

    torchvision's detectors carry the code that keeps picture sizes and numbers of detections variable in a trace.
    """
    onnx = need("--format onnx", "onnx")
    sides = {"images": {2: "height", 3: "width"}}
    found = {name: {1: "detections"} for name in names if name != "counts"}
    torch.onnx.export(
        # In evaluation mode: the exporter would put its parts into training mode afterwards.
        BatchOfOne(with_resize(model, TracedResize), names).eval(),
        (example[:1],),
        str(path),
        input_names=["images"],
        output_names=list(names),
        dynamic_axes=sides | found,
        opset_version=OLD_OPSET,
        dynamo=False,
    )
    _save_onnx(onnx, onnx.load(str(path)), path, metadata)


def _save_onnx(onnx: Any, model: Any, path: Path, metadata: dict[str, Any]) -> None:
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    path.write_bytes(model.SerializeToString())


def run_onnx(path: Path, names: Sequence[str]) -> Runner:
    """Open an ONNX file with onnxruntime and return a function from batch to outputs; it computes on all cores."""
    runtime = need_onnx()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Outputs]:
        values = session.run(list(names), {"images": images.numpy()})
        return split_slots({name: torch.from_numpy(value) for name, value in zip(names, values)})

    return run


def split_slots(outputs: dict[str, Tensor]) -> list[Outputs]:
    """Return each picture's outputs, without the empty slots."""
    return [
        {name: values[n, :count].numpy() for name, values in outputs.items() if name != "counts"}
        for n, count in enumerate(outputs["counts"].tolist())
    ]


def write_torchscript(model: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Script the model and write it, with ``metadata.json`` inside."""
    scripted = torch.jit.script(with_resize(model, ScriptedResize))
    content = io.BytesIO()  # torch's own writer ends the process when the disk is full
    torch.jit.save(scripted, content, _extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(content.getbuffer())


def run_torchscript(path: Path) -> Runner:
    """Load a TorchScript file and return a function from batch to outputs; the file takes one picture at a time."""
    loaded = torch.jit.load(str(path), map_location="cpu")
    return lambda images: [{name: value.numpy() for name, value in loaded(image).items()} for image in images]


def why_not(error: BaseException) -> str:
    """Say in one line what stands in the way of an export, the operation first where the exporter names one."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    texts = [str(link).strip() or type(link).__name__ for link in chain]
    for text in texts:
        if operation := re.search(r"target=torch\.ops\.([\w.]+)", text):
            return f"the exporter has no form of {operation[1]}"
        if place := re.search(r"Caused by: \((\S+) in (\w+)\)", text):
            return f"{place[2]} ({place[1]}) goes by values that only a run has: {text.splitlines()[0]}"
    return texts[-1].splitlines()[0]
