"""The command line of ``train.py``: every flag, and what they ask for.

The data and model flags are functions of their own, for other commands that look at the same data.
"""

import argparse
import contextlib
import datetime
import logging
from pathlib import Path

from annotations.findings import ON_BAD_DATA
from coco_eval import OKS_AREAS
from loading.splits import DATASETS, DEFAULT_DATA_PATH, Data, Source, root_of
from models.architectures import ARCHITECTURES, ModelSpec
from optimization.optimizer import OPTIMIZERS
from optimization.schedule import SCHEDULERS
from optimization.step import ON_NAN
from presets import PRESETS
from runtime.checkpoint import file_to_resume, find_newest, load_checkpoint
from utils import HelpFormatter

logger = logging.getLogger(__name__)


class _NotGiven(str):
    """A default, told apart from the same text when the user gives it."""


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser; groups are in the order in which ``train.py`` uses them."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]   (--help lists them)",
        description="Train and evaluate torchvision's detectors",
        formatter_class=HelpFormatter,
        add_help=add_help,
    )
    _add_process_flags(parser)
    add_data_flags(parser)
    _add_model_flags(parser)
    _add_optimization_flags(parser)
    _add_speed_flags(parser)
    _add_checkpoints_flags(parser)
    _add_evaluation_flags(parser)
    return parser


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("process")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="compute on this torch device, such as cuda:1 or cpu; default: cuda if any",
    )
    group.add_argument("--world-size", default=1, type=int, help=argparse.SUPPRESS)
    group.add_argument("--dist-url", default="env://", metavar="URL", help="let processes find each other at this URL")
    group.add_argument(
        "--seed", default=0, type=int, help="draw the order of images, augmentations and new weights from this number"
    )
    group.add_argument(
        "--use-deterministic-algorithms", action="store_true", help="refuse operations that vary from run to run"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, try the largest batch, write nothing"
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group that says which data are used, and how they are loaded and augmented."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path", default=DEFAULT_DATA_PATH, metavar="DIR",
        help="read the dataset in this folder; for yolo, the file data.yaml; for custom, ./custom if not given"
    )  # fmt: skip
    group.add_argument(
        "--dataset", default="coco", type=str.lower, choices=DATASETS,
        help="read COCO's objects (coco), COCO-style keypoints (coco_kp), one json per image (custom), YOLO's text "
        "files (yolo), Pascal VOC's xmls (voc), or draw shapes (shapes)"
    )  # fmt: skip
    group.add_argument("--train-images", metavar="DIR", help="read training images of another COCO-style set here")
    group.add_argument("--train-annotations", metavar="FILE", help="read the COCO json of --train-images here")
    group.add_argument("--val-images", metavar="DIR", help="read validation images of another COCO-style set here")
    group.add_argument("--val-annotations", metavar="FILE", help="read the COCO json of --val-images here")
    group.add_argument(
        "--val-fraction", type=float, metavar="SHARE",
        help="score on this share of the training pictures, held out by their content and --seed; for data without val"
    )  # fmt: skip
    group.add_argument(
        "--keep-negatives", action=argparse.BooleanOptionalAction, default=None,
        help="train on images without objects too; default: for all but coco and coco_kp"
    )  # fmt: skip
    group.add_argument(
        "--repeat-threshold", type=float, metavar="SHARE",
        help="train more often on pictures with classes that fewer than this share of the pictures show: "
        "sqrt(SHARE / their share) times per epoch, as for LVIS, where 0.001 is usual"
    )  # fmt: skip
    group.add_argument(
        "--on-bad-data", default="error", choices=ON_BAD_DATA, help="stop at faulty objects and images, or skip them"
    )
    group.add_argument(
        "--cache-dir", metavar="DIR", help="keep parsed annotations in this folder; default: below ~/.cache"
    )
    group.add_argument(
        "-b", "--batch-size", default=2, type=int, metavar="N", help="train on N images per process and step, N >= 1"
    )
    group.add_argument(
        "-j",
        "--workers",
        default=4,
        type=int,
        metavar="N",
        help="load images in N processes per process of the run; 0: none",
    )
    group.add_argument(
        "--aspect-ratio-group-factor", default=3, type=int, metavar="K",
        help="batch images of similar shape, in 2 K + 2 groups: 3 makes 8 groups, 0 makes 2, -1 none"
    )  # fmt: skip
    group.add_argument(
        "--data-augmentation", default="hflip", type=str.lower, choices=PRESETS,
        help="change training images at random: mirror (hflip), resize (multiscale), resize and crop (lsj), "
        "or crop and recolour as for SSD and SSDlite (ssd, ssdlite)"
    )  # fmt: skip
    group.add_argument(
        "--use-copypaste", action="store_true", help="paste objects between images; needs lsj and a mask model"
    )
    group.add_argument(
        "--backend", default="pil", type=str.lower, choices=("pil", "tensor", "tv_tensor"), help=argparse.SUPPRESS
    )
    group.add_argument("--use-v2", action="store_true", help=argparse.SUPPRESS)


def add_model_choice(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say which model, what it resizes images to, and its anchors."""
    group.add_argument(
        "--model", default=_NotGiven("maskrcnn_resnet50_fpn"), choices=ARCHITECTURES, metavar="NAME",
        help=f"build this model of torchvision (by default that of --resume): {', '.join(ARCHITECTURES)}"
    )  # fmt: skip
    group.add_argument(
        "--min-size", type=int, nargs="+", metavar="PIXELS",
        help="resize the short side of images to this length, or to one of these at random in training"
    )  # fmt: skip
    group.add_argument("--max-size", type=int, metavar="PIXELS", help="shrink images further until no side is longer")
    group.add_argument(
        "--anchor-sizes", type=_sizes_of_a_map, nargs="+", metavar="PIXELS",
        help="give anchors these sizes (roots of their areas) in the resized image, one for each feature map, several "
        "of one map with commas (32,40,50); default: the model's"
    )  # fmt: skip
    group.add_argument(
        "--anchor-ratios", type=float, nargs="+", metavar="RATIO",
        help="give anchors these shapes, height over width: 8 is tall, 0.125 wide; default: the model's"
    )  # fmt: skip


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add_model_choice(group)
    group.add_argument(
        "--weights", metavar="NAME|FILE", help="start the model from an entry of torchvision's weights, or from a file"
    )
    group.add_argument(
        "--weights-backbone", metavar="NAME|FILE", help="start the backbone alone from torchvision's weights or a file"
    )
    group.add_argument(
        "--trainable-backbone-layers", type=int, metavar="N",
        help="train the last N stages of the backbone, 0 to all; default: as many as torchvision's model does"
    )  # fmt: skip
    group.add_argument(
        "--rpn-score-thresh", type=float, metavar="SCORE",
        help="drop region proposals with an objectness below this, 0 to 1; R-CNN models only"
    )  # fmt: skip
    group.add_argument("--sync-bn", action="store_true", help="synchronize batch-norm statistics across GPUs")


def _add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", default=26, type=int, metavar="N", help="go through the training images N times")
    group.add_argument(
        "--opt", default="sgd", type=_optimizer_name, choices=OPTIMIZERS, help="update the weights with this optimizer"
    )
    group.add_argument(
        "--lr", default=0.02, type=float, metavar="RATE", help="learn at this rate; 0.02 is for 8 processes of 2 images"
    )
    group.add_argument(
        "--scale-lr", action="store_true", help="take --lr as for 16 images per update, and scale it to the real number"
    )
    group.add_argument("--momentum", default=0.9, type=float, metavar="M", help="give SGD this momentum, 0 to below 1")
    group.add_argument(
        "--wd", "--weight-decay", default=1e-4, type=float, metavar="W", dest="weight_decay",
        help="pull weights towards 0 with this factor (weight decay)"
    )  # fmt: skip
    group.add_argument(
        "--norm-weight-decay", type=float, metavar="W",
        help="give normalisation layers a weight decay of their own; default: that of --wd"
    )  # fmt: skip
    group.add_argument(
        "--lr-scheduler", default="multisteplr", type=str.lower, choices=SCHEDULERS,
        help="lower the learning rate in steps, or along a cosine to 0"
    )  # fmt: skip
    group.add_argument(
        "--lr-steps", default=[16, 22], nargs="+", type=int, metavar="EPOCH", help="lower the rate at these epochs"
    )
    group.add_argument(
        "--lr-gamma", default=0.1, type=float, metavar="FACTOR", help="multiply the rate by this at each of --lr-steps"
    )
    group.add_argument("--lr-step-size", default=8, type=int, help=argparse.SUPPRESS)
    group.add_argument(
        "--warmup-iters", type=int, metavar="N",
        help="raise the rate to --lr over the first N updates; default: 1000, but at most one epoch"
    )  # fmt: skip
    group.add_argument(
        "--accumulate", default=1, type=int, metavar="N", help="add gradients of N batches before each update"
    )
    group.add_argument(
        "--clip-grad-norm", type=float, metavar="NORM", help="shrink gradients with a larger norm to this one, above 0"
    )
    group.add_argument("--amp", action="store_true", help="train in mixed precision, which is faster on GPUs")
    group.add_argument(
        "--amp-dtype", default="auto", choices=("auto", "float16", "bfloat16"),
        help="use this dtype with --amp; auto: bfloat16 where the device has it, else float16"
    )  # fmt: skip
    group.add_argument(
        "--ema", type=float, nargs="?", const=0.9998, metavar="DECAY",
        help="average the weights with this decay (alone: 0.9998), and score and save the average too"
    )  # fmt: skip
    group.add_argument(
        "--on-nan", default="stop", choices=ON_NAN, help="stop at a loss that is not finite, or skip up to 20 updates"
    )


def _add_speed_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--channels-last", action="store_true", help="keep the backbone in channels-last order, faster with --amp"
    )
    group.add_argument("--compile", action="store_true", help="compile the backbone with torch.compile")
    group.add_argument(
        "--torchvision-step", action="store_true",
        help="take torchvision's own training step, picture by picture, to compare with",
    )  # fmt: skip
    group.add_argument(
        "--profile", default=0, type=int, metavar="N", help="measure what N steps spend their time on; 0: nothing"
    )


def _add_checkpoints_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--output-dir",
        metavar="DIR",
        help="write into this folder; default: custom/result, or runs/<dataset>-<model>-<time>; '' saves nothing",
    )
    group.add_argument(
        "--keep-checkpoints", default=3, type=int, metavar="N", help="keep the newest N model_<epoch>.pth files; 0: all"
    )
    group.add_argument(
        "--checkpoint-every", type=_interval, metavar="N",
        help="also save within an epoch, every N updates, or every N minutes with an m: 15m"
    )  # fmt: skip
    group.add_argument(
        "--resume",
        default="",
        metavar="FILE",
        help="continue or evaluate this file; auto: the newest in --output-dir",
    )
    group.add_argument(
        "--verify-resume", type=int, nargs="?", const=6, metavar="UPDATES",
        help="train so many updates (6) with and without an interruption, compare the results, and end"
    )  # fmt: skip
    group.add_argument(
        "--start-epoch", "--start_epoch", default=0, type=int, metavar="N", help="begin at epoch N, counted from 0"
    )
    group.add_argument("--print-freq", default=20, type=int, metavar="N", help="print a line every N steps, N >= 1")


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--test-only", action="store_true", help="evaluate and end; needs no training data")
    group.add_argument("--eval-every", default=1, type=int, metavar="N", help="evaluate every N epochs; 0: never")
    group.add_argument(
        "--best-metric",
        metavar="KIND/FIGURE",
        help="keep the best epoch by this figure, such as bbox/AP50, in best.pth; default: AP of the task",
    )
    group.add_argument(
        "--early-stop", default=0, type=int, metavar="N", help="end after N evaluations without a better one; 0: never"
    )
    group.add_argument("--val-loss", action="store_true", help="also report the losses on the validation images")
    group.add_argument(
        "--eval-batch-size", default=1, type=int, metavar="N", help="evaluate N images per process at a time, N >= 1"
    )
    group.add_argument(
        "--tile", type=int, metavar="PIXELS",
        help="cut images that are larger into tiles of this size and join what is found in them; with --test-only"
    )  # fmt: skip
    group.add_argument(
        "--overlap", type=float, metavar="SHARE",
        help="let neighbouring tiles share this part of their sides, 0 to 0.9; default: 0.2"
    )  # fmt: skip
    group.add_argument(
        "--save-predictions", action=argparse.BooleanOptionalAction, default=True,
        help="write COCO results files of every evaluation into --output-dir"
    )  # fmt: skip
    group.add_argument(
        "--max-dets", type=int, metavar="N", help="keep and score the best N detections per image; default: the model's"
    )
    group.add_argument(
        "--kpt-oks-sigmas", type=float, nargs="+", metavar="SIGMA",
        help="allow keypoints this error, one for all or one each (COCO's nose: 0.026); default: the dataset's"
    )  # fmt: skip
    group.add_argument(
        "--oks-area", default="annotation", choices=OKS_AREAS,
        help="divide keypoint errors by the annotated area, the box's, or 0.53 of the box's (box53)"
    )  # fmt: skip


def _optimizer_name(text: str) -> str:
    """Read --opt as torchvision's scripts do: anything that starts with sgd is SGD."""
    text = text.lower()
    if text.startswith("sgd"):
        return "sgd_nesterov" if "nesterov" in text else "sgd"
    return text


def _interval(text: str) -> int | datetime.timedelta:
    """Read --checkpoint-every: a number of updates, or minutes such as 15m."""
    number = text.removesuffix("m")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected updates, such as 500, or minutes, such as 15m")
    return datetime.timedelta(minutes=int(number)) if text.endswith("m") else int(number)


def _sizes_of_a_map(text: str) -> tuple[float, ...]:
    """Read a word of --anchor-sizes: the sizes of one feature map, such as 32 or 32,40,50."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected pixels, such as 32, or 32,40,50 for one map") from None


def take_model_from_checkpoint(args: argparse.Namespace) -> None:
    """Set ``--model``, where it is not given, to that of the checkpoint that ``--resume`` names, if there is one."""
    if not isinstance(args.model, _NotGiven):
        return
    name = str(args.model)
    with contextlib.suppress(ValueError, OSError):  # what is wrong with it is said where it is opened
        if args.resume == "auto" and args.output_dir:
            newest = find_newest(Path(args.output_dir) / "weights")
            name = name if newest is None else newest[1]["model_spec"]["name"]
        elif args.resume not in ("", "auto"):
            name = load_checkpoint(file_to_resume(args.resume))["model_spec"]["name"]
    args.model = name if name in ARCHITECTURES else str(args.model)


def data_source(args: argparse.Namespace) -> Source:
    """Return which data the flags name."""
    paths = {"train": (args.train_images, args.train_annotations), "val": (args.val_images, args.val_annotations)}
    return Source(
        args.dataset,
        root_of(args.dataset, args.data_path),
        on_bad_data=args.on_bad_data,
        cache_dir=Path(args.cache_dir) if args.cache_dir else None,
        paths=paths,
        val_fraction=args.val_fraction,
        seed=args.seed,
    )


def wanted_spec(args: argparse.Namespace, data: Data) -> ModelSpec:
    """Return the record of the model that flags and data ask for, before any weights are known."""
    architecture = ARCHITECTURES[args.model]
    return ModelSpec(
        name=args.model,
        num_classes=data.label_map.num_classes,
        num_keypoints=data.num_keypoints if architecture.task == "keypoint" else 0,
        trainable_layers=len(architecture.backbone.stages),
        min_size=tuple(args.min_size) if args.min_size else None,
        max_size=args.max_size,
        skip_resize=PRESETS[args.data_augmentation].resizes,
        detections_per_img=args.max_dets,
        rpn_score_thresh=args.rpn_score_thresh,
        anchor_sizes=tuple(args.anchor_sizes) if args.anchor_sizes else None,
        anchor_ratios=tuple(args.anchor_ratios) if args.anchor_ratios else None,
    )


def keeps_negatives(args: argparse.Namespace) -> bool:
    """Return whether images without objects are trained on."""
    return DATASETS[args.dataset].keeps_negatives if args.keep_negatives is None else args.keep_negatives
