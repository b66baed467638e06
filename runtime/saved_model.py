"""A model from a checkpoint."""

import dataclasses
import logging
from typing import Any

from torch import nn

from models.anchors import anchor_words
from models.architectures import ModelSpec, build_model
from runtime.checkpoint import CheckpointError

logger = logging.getLogger(__name__)


def rebuild_model(
    content: dict[str, Any], wanted: ModelSpec | None = None, *, averaged: bool = True
) -> tuple[nn.Module, ModelSpec]:
    """Build the checkpoint's own model, with its weights.

    Args:
        content: A checkpoint as it was read: ``model_spec``, ``model`` and perhaps averaged weights.
        wanted: What flags and data ask for: name, classes and keypoints must agree, and anchors where flags give
            them; sizes and the limit of detections are taken from here where it has them.
        averaged: Take the averaged weights where there are any, as the checkpoint's metrics do; training goes on with
            the others.

    Raises:
        CheckpointError: The checkpoint is that of another model; both values are named.
    """
    spec = ModelSpec.from_plain(content["model_spec"])
    if wanted is not None:
        for what in ("name", "num_classes", "num_keypoints"):
            if getattr(spec, what) != getattr(wanted, what):
                raise CheckpointError(
                    f"the checkpoint's {what} is {getattr(spec, what)}, flags and data ask for {getattr(wanted, what)}"
                )
        for what in ("anchor_sizes", "anchor_ratios"):
            own, asked = getattr(spec, what), getattr(wanted, what)
            if asked is not None and own != asked:
                flag = f"--{what.replace('_', '-')}"
                known = "the model's own" if own is None else anchor_words(own)
                raise CheckpointError(
                    f"the checkpoint was trained with {flag} {known}, got {anchor_words(asked)}; leave the flag out"
                )
        changed = {
            name: getattr(wanted, name) for name in ("min_size", "max_size", "detections_per_img", "rpn_score_thresh")
        }
        changed = {name: value for name, value in changed.items() if value is not None}
        spec = dataclasses.replace(spec, skip_resize=wanted.skip_resize, **changed)
    model = build_model(spec)
    model.load_state_dict(content["model_ema" if averaged and "model_ema" in content else "model"])
    return model, spec
