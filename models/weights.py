"""Weights into models: torchvision's enums, state dicts and checkpoints from files.

Files are always read with ``weights_only=True``, torchvision's own downloads too, so none of them can run code.
"""

import argparse
import http.client
import logging
import pickle
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from files import read_torch_file
from models.architectures import ARCHITECTURES, Backbone, ModelSpec, backbone_keys, build_model
from process.waiting import STOP_SIGNALS, signals_raise
from utils import sha256_of_file

logger = logging.getLogger(__name__)

# A server that sends nothing for so long is given up.
SILENT_SERVER_SECONDS = 60.0

# What torchvision's scripts put into their checkpoints; it is a plain bag of values.
_IN_CHECKPOINTS = (argparse.Namespace,)

# The layers whose shape depends on the number of classes or keypoints, or of anchors at a place.
HEADS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.",
    "roi_heads.keypoint_predictor.",
    "head.classification_head.",
    "head.regression_head.bbox_reg.",
    "head.regression_head.module_list.",
    "rpn.head.cls_logits.",
    "rpn.head.bbox_pred.",
)


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from: one of torchvision's enum entries, or a file."""

    entry: WeightsEnum | None = None
    path: Path | None = None

    def __str__(self) -> str:
        """Return the name a user knows it by."""
        return str(self.entry if self.entry is not None else self.path)


def find_weights(name: str, enum: type[WeightsEnum], flag: str) -> WeightsSource:
    """Return what a weights flag means, without reading it.

    Args:
        name: An entry of ``enum``, with or without the enum's name in front, or the path of a file.
        enum: The entries that fit.
        flag: For messages.

    Raises:
        ValueError: Neither an entry nor a file.
    """
    entry = name.removeprefix(f"{enum.__name__}.")
    if entry in enum.__members__:
        return WeightsSource(entry=enum[entry])
    if Path(name).is_file():
        return WeightsSource(path=Path(name))
    if Path(name).is_dir():
        raise ValueError(f"{flag} {name}: a folder, expected a file, such as {Path(name) / 'weights' / 'best.pth'}")
    known = ", ".join(f"{enum.__name__}.{member}" for member in enum.__members__)
    if "://" in name:
        raise ValueError(f"{flag} {name}: URLs are not fetched; download the file and give its path, or one of {known}")
    raise ValueError(f"{flag} {name}: no such file and no such weights; expected a path or one of {known}")


def find_model_weights(name: str, model: str) -> WeightsSource:
    """Return what ``--weights name`` means for a detector."""
    return find_weights(name, torchvision.models.get_model_weights(model), "--weights")


def find_backbone_weights(name: str, model: str) -> WeightsSource:
    """Return what ``--weights-backbone name`` means for a detector."""
    return find_weights(name, ARCHITECTURES[model].backbone.weights, "--weights-backbone")


def read_weights(source: WeightsSource) -> dict[str, Tensor]:
    """Return the state dict of a source; of a checkpoint its averaged weights, else its ``model``.

    Raises:
        ValueError: The file is no state dict.
    """
    if source.entry is not None:
        return _download(source.entry)
    assert source.path is not None
    content = read_torch_file(source.path, _IN_CHECKPOINTS)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content.get("model_ema", content["model"])  # the average is what the checkpoint's scores are of
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        expected = "expected a state dict or a checkpoint with a state dict under 'model'"
        raise ValueError(f"{source.path}: {expected}, found {found or 'nothing'}")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _download(entry: WeightsEnum) -> dict[str, Tensor]:
    """Return torchvision's own weights, from torch's cache or from the web.

    Raises:
        ValueError: They cannot be had; the text says how to bring them.
        Stopped: A signal has come; what was loaded until then is removed.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if cached.exists():
        _check_hash(cached)  # torch checks what it downloads, and nothing that lies here already
    else:
        logger.info("downloading %s to %s", entry.url, cached)
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENT_SERVER_SECONDS)
    try:
        with signals_raise(STOP_SIGNALS):
            return dict(entry.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        remedy = f"load {entry.url} on a machine with network, and put it here as {cached}"
        raise ValueError(f"{entry}: cannot be loaded ({reason.splitlines()[0]}); {remedy}") from error
    finally:
        socket.setdefaulttimeout(silence)


def _check_hash(path: Path) -> None:
    """Warn of a file that is not what its name says: torchvision's names end with the start of the SHA-256."""
    expected, found = path.stem.rpartition("-")[2], sha256_of_file(path)
    if not found.startswith(expected):
        logger.warning(
            "%s: not the weights that torchvision published under this name: their SHA-256 begins with %s, the file's "
            "with %s; remove it, and it is downloaded anew",
            path,
            expected,
            found[: len(expected)],
        )


def structure_of_weights(source: WeightsSource, state: dict[str, Tensor], model: str) -> dict[str, Any]:
    """Return the fields of `ModelSpec` that must be as these weights were trained, and their own anchors."""
    content = read_torch_file(source.path, _IN_CHECKPOINTS) if source.path is not None else {}
    if "model_spec" in content:  # a checkpoint of this suite
        theirs = ModelSpec.from_plain(content["model_spec"])
        names = ["frozen_norm", "frozen_norm_eps", "full_tail"]
        if theirs.name == model:
            names += ["anchor_sizes", "anchor_ratios"]
        return {name: getattr(theirs, name) for name in names}
    architecture = ARCHITECTURES[model]
    has_counters = any(k.startswith("backbone.body.") and k.endswith("num_batches_tracked") for k in state)
    frozen_norm = architecture.freezes_norm and not has_counters
    return {
        "frozen_norm": frozen_norm,
        "frozen_norm_eps": 0.0 if frozen_norm and architecture.zero_eps and _is_published(source, model) else 1e-5,
        "full_tail": architecture.has_reduced_tail and _has_full_tail(state),
    }


def _has_full_tail(state: dict[str, Tensor]) -> bool:
    """Tell whether an SSDlite state dict has the 960 channels of the full MobileNetV3 tail, not the reduced 480."""
    tail = [v for k, v in state.items() if k.startswith("backbone.features.1.") and k.endswith(".0.weight")]
    return bool(tail) and tail[-1].shape[0] == 960


def _is_published(source: WeightsSource, model: str) -> bool:
    """Tell whether these are torchvision's COCO_V1 weights of ``model``, by entry or by the hash in their name."""
    published = torchvision.models.get_model_weights(model)["COCO_V1"]
    if source.entry is not None:
        return source.entry is published
    assert source.path is not None
    return sha256_of_file(source.path).startswith(published.url.rsplit("-", 1)[1].removesuffix(".pth"))


def load_backbone(model: nn.Module, backbone: Backbone, source: WeightsSource) -> None:
    """Load a classification network's weights into a detector's backbone.

    Raises:
        ValueError: They are those of another network.
    """
    state = read_weights(source)
    target = model.state_dict()
    keys = backbone_keys(model, backbone)
    for theirs, ours in keys.items():
        if theirs not in state:
            is_detector = any(key.startswith("backbone.") for key in state)
            hint = "; --weights takes those of a whole detector" if is_detector else ""
            raise ValueError(f"{source}: not weights of {backbone.name}: {theirs!r} is missing{hint}")
        if state[theirs].shape != target[ours].shape:
            shapes = f"{theirs!r} has shape {list(state[theirs].shape)}, expected {list(target[ours].shape)}"
            raise ValueError(f"{source}: not weights of {backbone.name}: {shapes}")
    model.load_state_dict({ours: state[theirs] for theirs, ours in keys.items()}, strict=False)
    logger.info("backbone %s starts from %s", backbone.name, source)


def load_model_weights(model: nn.Module, state: dict[str, Tensor], source: WeightsSource, spec: ModelSpec) -> list[str]:
    """Load a detector's weights as far as they fit; only heads may differ.

    Returns:
        The entries that keep their random start, because the weights have another number of classes, keypoints or
        anchors.

    Raises:
        ValueError: These are weights of another model.
    """
    target = model.state_dict()
    counters = {key for key in target if key.endswith("num_batches_tracked")}
    missing = [key for key in target if key not in state and key not in counters]
    other_shape = [key for key in target if key in state and state[key].shape != target[key].shape]
    unexpected = [key for key in state if key not in target and not key.endswith("num_batches_tracked")]
    foreign = [key for key in (*missing, *other_shape, *unexpected) if not key.startswith(HEADS)]
    if foreign:
        is_detector = any(key.startswith("backbone.") for key in state)
        hint = "give the --model that they are of" if is_detector else "--weights-backbone takes those of a classifier"
        raise ValueError(
            f"--weights {source}: these are not weights of {spec.name}: {len(foreign)} entries do not fit, "
            f"{foreign[0]!r} among them; {hint}"
        )
    # A layer of A anchors times C classes may have the same shape for others.
    of_classes = {key.replace("bbox_reg", "cls_logits").replace("regression", "classification") for key in other_shape}
    fresh = sorted({*missing, *other_shape, *(of_classes & target.keys())})
    model.load_state_dict({k: v for k, v in state.items() if k in target and k not in fresh}, strict=False)
    logger.info("%s starts from %s", spec.name, source)
    if fresh:
        wants = f"{spec.num_classes} classes" + (f" and {spec.num_keypoints} keypoints" if spec.num_keypoints else "")
        if spec.anchor_sizes or spec.anchor_ratios:
            wants += " and anchors of your own"
        logger.info("re-initialised for %s: %s", wants, ", ".join(fresh))
    return fresh


def build_start_model(
    spec: ModelSpec,
    *,
    weights: str | None = None,
    weights_backbone: str | None = None,
    trainable_layers: int | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """Build a model with the weights a run starts from.

    Args:
        spec: What flags and data ask for; norms, tail and trainable layers follow from the weights.
        weights: ``--weights``, for the whole model.
        weights_backbone: ``--weights-backbone``; has no effect beside ``weights``.
        trainable_layers: ``--trainable-backbone-layers``; without weights all layers are trained.

    Returns:
        The model, and its completed record.
    """
    architecture = spec.architecture
    if not weights and not weights_backbone:
        if trainable_layers is not None:
            logger.warning("--trainable-backbone-layers has no effect: without weights all layers are trained")
        return build_model(spec), spec
    layers = architecture.trainable_layers if trainable_layers is None else trainable_layers
    spec = replace(spec, trainable_layers=layers, frozen_norm=architecture.freezes_norm)
    if weights:
        source = find_model_weights(weights, spec.name)
        state = read_weights(source)
        structure = structure_of_weights(source, state, spec.name)
        given = {name for name in ("anchor_sizes", "anchor_ratios") if getattr(spec, name) is not None}
        spec = replace(spec, **{name: value for name, value in structure.items() if name not in given})
        model = build_model(spec)
        load_model_weights(model, state, source, spec)
        return model, spec
    assert weights_backbone is not None
    spec = replace(spec, full_tail=architecture.has_reduced_tail)
    model = build_model(spec)
    load_backbone(model, architecture.backbone, find_backbone_weights(weights_backbone, spec.name))
    return model, spec
