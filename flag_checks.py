"""What flags rule out among each other: the checks that need no data, before any process group."""

import argparse
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from evaluation.coco_metrics import SCORE_KINDS
from inference.tiles import Tiling
from loading.splits import DATASETS
from models.architectures import ARCHITECTURES, IOU_TYPES, ModelSpec, build_model
from models.weights import find_backbone_weights, find_model_weights
from presets import PRESETS
from process.device import choose_device

logger = logging.getLogger(__name__)

_PATH_FLAGS = ("train_images", "train_annotations", "val_images", "val_annotations")


# What numbers must be: the test, and the flags that go by it.
_Rules = Mapping[str, tuple[Callable[[float], bool], Sequence[str]]]
_NUMBERS_OF_DATA: _Rules = {
    "must be at least 1": (lambda n: n >= 1, ("batch_size", "min_size", "max_size")),
    "must not be negative": (lambda n: n >= 0, ("workers",)),
    "expected a share above 0, up to 1, such as 0.05": (lambda x: 0 < x <= 1, ("repeat_threshold",)),
    "expected a share between 0 and 1, such as 0.2": (lambda x: 0 < x < 1, ("val_fraction",)),
}
_NUMBERS: _Rules = {
    "must be at least 1": (lambda n: n >= 1, ("epochs", "print_freq", "eval_batch_size", "accumulate", "max_dets")),
    "must be at least 2": (lambda n: n >= 2, ("verify_resume",)),
    "must not be negative": (
        lambda n: n >= 0,
        ("eval_every", "keep_checkpoints", "start_epoch", "early_stop", "profile", "warmup_iters", "lr_steps"),
    ),
    "expected a finite number, 0 or more": (
        lambda x: 0 <= x < math.inf,
        ("lr", "weight_decay", "norm_weight_decay", "lr_gamma"),
    ),
    "expected a finite number above 0": (lambda x: 0 < x < math.inf, ("clip_grad_norm", "kpt_oks_sigmas")),
    "expected 0 to below 1": (lambda x: 0 <= x < 1, ("momentum",)),
    "expected 0 to 1": (lambda x: 0 <= x <= 1, ("rpn_score_thresh",)),
    "expected a decay between 0 and 1, such as 0.9998": (lambda x: 0 < x < 1, ("ema",)),
}


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace, rules: _Rules) -> None:
    """End with one line where a number, or one of several, is out of range; NaN always is."""
    for expected, (is_allowed, names) in rules.items():
        for name in names:
            given = getattr(args, name)
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if value is not None and not is_allowed(value):
                    parser.error(f"--{name.replace('_', '-')} {value}: {expected}")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line on stderr and exit code 2 where flags contradict each other or name what does not exist."""
    _check_numbers(parser, args, _NUMBERS)
    layers = args.trainable_backbone_layers
    num_stages = len(ARCHITECTURES[args.model].backbone.stages)
    if layers is not None and not 0 <= layers <= num_stages:
        parser.error(f"--trainable-backbone-layers {layers}: expected 0 to {num_stages}")
    if args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch {args.start_epoch}: nothing is left of {args.epochs} epochs")
    if args.dry_run and args.test_only:
        parser.error("--dry-run plans a training: it does not go with --test-only")
    if args.verify_resume and (args.test_only or args.resume == "auto"):
        parser.error("--verify-resume trains: it goes with --resume FILE or without, not with --test-only or auto")
    check_data_args(parser, args)
    if args.kpt_oks_sigmas and ARCHITECTURES[args.model].task != "keypoint":
        parser.error(f"--kpt-oks-sigmas: {args.model} has no keypoints")
    if args.rpn_score_thresh is not None and not ARCHITECTURES[args.model].has_proposals:
        parser.error(f"--rpn-score-thresh: {args.model} has no region proposals")
    if args.batch_size < ARCHITECTURES[args.model].min_batch_size and not args.test_only:
        parser.error(f"--batch-size 1: {args.model} trains on at least 2, its last maps have one value per channel")
    if args.sync_bn and args.compile:
        parser.error("--sync-bn with --compile: norms that wait for other processes are not compiled; leave one out")
    if args.best_metric is None:
        args.best_metric = f"{IOU_TYPES[ARCHITECTURES[args.model].task][-1]}/AP"
    known = metric_names(ARCHITECTURES[args.model].task)
    if args.best_metric not in known:
        parser.error(f"--best-metric {args.best_metric}: expected one of {', '.join(known)}")
    if args.test_only and not (args.resume or args.weights):
        parser.error("--test-only needs a model: --resume CHECKPOINT or --weights NAME")
    if args.tile is not None and not args.test_only:
        parser.error("--tile scores a trained model on tiles: it goes with --test-only")
    try:
        Tiling.of_flags(args.tile, args.overlap, args.eval_batch_size)
        choose_device(args.device)
        if args.weights:
            find_model_weights(args.weights, args.model)
        if args.weights_backbone:
            find_backbone_weights(args.weights_backbone, args.model)
    except ValueError as error:
        parser.error(str(error))


def check_data_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Do what `check_args` does for the flags of `add_data_flags` and `add_model_choice`."""
    architecture = ARCHITECTURES[args.model]
    _check_numbers(parser, args, _NUMBERS_OF_DATA)
    given = [f"--{name.replace('_', '-')}" for name in _PATH_FLAGS if getattr(args, name)]
    if given and not DATASETS[args.dataset].has_coco_files:
        parser.error(f"{given[0]}: files of their own go with --dataset coco or coco_kp, not {args.dataset}")
    if architecture.task not in DATASETS[args.dataset].tasks:
        others = ", ".join(name for name, kind in DATASETS.items() if architecture.task in kind.tasks)
        learns = f"--model {args.model} learns {architecture.task}s beside boxes"
        parser.error(f"{learns}, which --dataset {args.dataset} does not have: use one of {others}")
    if architecture.fixed_size is not None and (args.min_size or args.max_size):
        parser.error(f"--min-size and --max-size: {args.model} always resizes to {architecture.fixed_size}")
    if architecture.fixed_size is not None and PRESETS[args.data_augmentation].resizes:
        parser.error(
            f"--data-augmentation {args.data_augmentation}: {args.model} always resizes; use ssd, ssdlite or hflip"
        )
    if args.anchor_sizes or args.anchor_ratios:
        sizes, ratios = args.anchor_sizes and tuple(args.anchor_sizes), args.anchor_ratios and tuple(args.anchor_ratios)
        try:
            with torch.device("meta"):
                build_model(ModelSpec(args.model, 2, num_keypoints=1, anchor_sizes=sizes, anchor_ratios=ratios))
        except ValueError as error:
            parser.error(str(error))
    if args.use_copypaste and args.data_augmentation != "lsj":
        parser.error("--use-copypaste needs --data-augmentation lsj")
    if args.use_copypaste and architecture.task != "mask":
        parser.error(f"--use-copypaste pastes masks, which {args.model} does not learn; use a mask model")
    if (args.train_images and not args.train_annotations) or (args.val_images and not args.val_annotations):
        parser.error("--train-images and --val-images need --train-annotations and --val-annotations")


def metric_names(task: str) -> list[str]:
    """Return what ``--best-metric`` may be for models of a task."""
    return [f"{kind}/{line[0]}" for kind in IOU_TYPES[task] for line in SCORE_KINDS[kind].summary]


def log_ineffective_flags(args: argparse.Namespace) -> None:
    """Say which given flags change nothing."""
    if args.use_v2 or args.backend != "pil":
        logger.info(
            "--use-v2 and --backend change nothing: there is one pipeline, torchvision's transforms v2 on tensors"
        )
    if args.world_size != 1:
        logger.warning("--world-size has no effect: torchrun and SLURM say how many processes there are")
    if args.lr_step_size != 8:
        logger.warning("--lr-step-size has no effect, as in torchvision's scripts; use --lr-steps")
    if args.amp_dtype != "auto" and not args.amp:
        logger.warning("--amp-dtype has no effect without --amp")
    if args.lr_scheduler != "multisteplr" and args.lr_steps != [16, 22]:
        logger.warning("--lr-steps has no effect with --lr-scheduler %s", args.lr_scheduler)
    if args.early_stop and not args.eval_every:
        logger.warning("--early-stop has no effect without evaluations (--eval-every 0)")
    if args.weights and args.weights_backbone:
        logger.warning("--weights-backbone has no effect: --weights is for the whole model")
    # With auto they are for the first start, which has no checkpoint.
    if args.resume not in ("", "auto"):
        given = {"weights": args.weights, "weights-backbone": args.weights_backbone, "start-epoch": args.start_epoch}
        for name in [name for name, value in given.items() if value]:
            logger.warning("--%s has no effect beside --resume: the checkpoint has its own", name)
