"""Train and evaluate torchvision's detectors.

One device:
    python train.py --dataset coco --data-path /data/coco --model fasterrcnn_resnet50_fpn --output-dir runs/first
Several GPUs, and CPUs as well:
    torchrun --nproc_per_node=8 train.py --dataset coco --data-path /data/coco --model fasterrcnn_resnet50_fpn
Only evaluate:
    python train.py --dataset coco --data-path /data/coco --test-only --resume runs/first/weights/checkpoint.pth
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from checkpoint import CheckpointFolder, lock_folder, open_checkpoint, rebuild_model
from coco_eval import OKS_AREAS, CocoEvaluator
from data_loading import build_train_loader, build_val_loader
from datasets import DATASETS, Data, Source, load_data
from engine import ON_NAN, NonFiniteLossError, Progress
from findings import ON_BAD_DATA
from group_by_aspect_ratio import GroupedBatchSampler
from models import ARCHITECTURES, ModelSpec
from optimization import OPTIMIZERS, SCHEDULERS, LearningRate, build_optimizer, choose_amp, default_warmup
from presets import PRESETS, RESIZING_PRESETS
from run_folder import append_metrics, choose_output_dir, describe_scores, plain_flags
from scoring import score_model
from stopping import StopRequest, die_with_parent
from training import TrainingState, train_epochs
from utils import (
    Distributed,
    check_same_everywhere,
    choose_device,
    init_distributed,
    main_process_first,
    seed_torch,
    setup_logging,
    shut_down_distributed,
)
from weights import build_start_model, find_backbone_weights, find_model_weights

logger = logging.getLogger("train")

DEFAULT_DATA_PATH = "/datasets01/COCO/022719/"
EXIT_BAD_LOSS = 3


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser; groups are in the order in which `main` uses them."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate torchvision's detectors",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        add_help=add_help,
    )
    group = parser.add_argument_group("process")
    group.add_argument("--device", default=None, help="torch device; cuda where there is one, else cpu")
    group.add_argument("--world-size", default=1, type=int, help="number of processes; torchrun and SLURM set it")
    group.add_argument("--dist-url", default="env://", help="init method of torch.distributed")
    group.add_argument("--seed", default=0, type=int, help="of order, augmentation, start weights and sampling")
    group.add_argument(
        "--use-deterministic-algorithms", action="store_true", help="refuse operations that vary from run to run"
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data-path", default=DEFAULT_DATA_PATH, help="root of the dataset; for custom: ./custom")
    group.add_argument("--dataset", default="coco", type=str.lower, choices=DATASETS)
    group.add_argument("--train-images", help="image folder of another COCO-style training split")
    group.add_argument("--train-annotations", help="its COCO json")
    group.add_argument("--val-images", help="image folder of another COCO-style validation split")
    group.add_argument("--val-annotations", help="its COCO json")
    group.add_argument(
        "--keep-negatives",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train on images without objects too; default: only for custom and shapes",
    )
    group.add_argument("--on-bad-data", default="error", choices=ON_BAD_DATA, help="stop at bad data, or leave it out")
    group.add_argument("--cache-dir", help="folder for annotation caches; default: below ~/.cache")
    group.add_argument("-b", "--batch-size", default=2, type=int, help="images per process and step")
    group.add_argument("-j", "--workers", default=4, type=int, metavar="N", help="loading processes per process")
    group.add_argument(
        "--aspect-ratio-group-factor", default=3, type=int, help="k: 2 k + 2 groups of similar images; negative: none"
    )
    group.add_argument("--data-augmentation", default="hflip", type=str.lower, choices=PRESETS)
    group.add_argument("--use-copypaste", action="store_true", help="paste objects between images; with lsj and masks")
    group.add_argument(
        "--backend", default="pil", type=str.lower, choices=("pil", "tensor", "tv_tensor"), help="no effect"
    )
    group.add_argument("--use-v2", action="store_true", help="no effect: transforms are always v2")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="maskrcnn_resnet50_fpn", choices=ARCHITECTURES)
    group.add_argument("--weights", help="weights enum entry, state dict or checkpoint to start the whole model from")
    group.add_argument("--weights-backbone", help="weights enum entry or state dict to start the backbone from")
    group.add_argument(
        "--trainable-backbone-layers", type=int, help="stages to train, from the output on; default: the model's own"
    )
    group.add_argument("--min-size", type=int, nargs="+", metavar="PIXELS", help="short sides the model resizes to")
    group.add_argument("--max-size", type=int, metavar="PIXELS", help="limit of the long side")
    group.add_argument("--rpn-score-thresh", type=float, help="of R-CNN models")
    group.add_argument("--sync-bn", action="store_true", help="batch norms over all processes")

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", default=26, type=int, metavar="N")
    group.add_argument("--opt", default="sgd", type=_optimizer_name, choices=OPTIMIZERS)
    group.add_argument("--lr", default=0.02, type=float, help="learning rate; 0.02 is for 8 processes of 2 images")
    group.add_argument(
        "--scale-lr", action="store_true", help="--lr is for 16 images per update: scale it to the real number"
    )
    group.add_argument("--momentum", default=0.9, type=float, metavar="M", help="of SGD")
    group.add_argument("--wd", "--weight-decay", default=1e-4, type=float, metavar="W", dest="weight_decay")
    group.add_argument("--norm-weight-decay", type=float, help="weight decay of normalisation layers; default: --wd")
    group.add_argument("--lr-scheduler", default="multisteplr", type=str.lower, choices=SCHEDULERS)
    group.add_argument("--lr-steps", default=[16, 22], nargs="+", type=int, metavar="EPOCH", help="of multisteplr")
    group.add_argument("--lr-gamma", default=0.1, type=float, help="of multisteplr")
    group.add_argument("--lr-step-size", default=8, type=int, help="no effect, as in torchvision's scripts")
    group.add_argument("--warmup-iters", type=int, metavar="N", help="updates; default: 1000, at most the first epoch")
    group.add_argument("--accumulate", default=1, type=int, metavar="N", help="steps per update")
    group.add_argument("--clip-grad-norm", type=float, metavar="NORM", help="limit of the gradient's norm")
    group.add_argument("--amp", action="store_true", help="train in mixed precision")
    group.add_argument(
        "--amp-dtype", default="auto", choices=("auto", "float16", "bfloat16"), help="auto: bfloat16 if possible"
    )
    group.add_argument("--on-nan", default="stop", choices=ON_NAN, help="what to do when a loss is not finite")

    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--output-dir", help="default: custom/result, or runs/<dataset>-<model>-<time>; '' saves nothing"
    )
    group.add_argument(
        "--keep-checkpoints", default=3, type=int, metavar="N", help="model_N.pth files that stay; 0: all"
    )
    group.add_argument("--checkpoint-every", type=int, metavar="N", help="also save every N updates")
    group.add_argument("--resume", default="", help="checkpoint to continue; auto: the newest one in --output-dir")
    group.add_argument("--start-epoch", "--start_epoch", default=0, type=int, metavar="N", help="first epoch")
    group.add_argument("--print-freq", default=20, type=int, metavar="N", help="steps between log lines")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--test-only", action="store_true", help="evaluate and end; needs no training data")
    group.add_argument("--eval-every", default=1, type=int, metavar="N", help="epochs between evaluations; 0: never")
    group.add_argument("--eval-batch-size", default=1, type=int, metavar="N", help="images per process and step")
    group.add_argument(
        "--save-predictions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write COCO results files of every evaluation into --output-dir",
    )
    group.add_argument("--max-dets", type=int, metavar="N", help="detections per image that are kept and scored")
    group.add_argument(
        "--kpt-oks-sigmas", type=float, nargs="+", metavar="SIGMA", help="one, or one per keypoint (COCO's nose: 0.026)"
    )
    group.add_argument("--oks-area", default="annotation", choices=OKS_AREAS, help="object area that OKS divides by")
    return parser


def _optimizer_name(text: str) -> str:
    """Read --opt as torchvision's scripts do: anything that starts with sgd is SGD."""
    text = text.lower()
    if text.startswith("sgd"):
        return "sgd_nesterov" if "nesterov" in text else "sgd"
    return text


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line on stderr and exit code 2 where flags contradict each other or name what does not exist."""
    architecture = ARCHITECTURES[args.model]
    for name in ("batch_size", "epochs", "print_freq", "eval_batch_size", "accumulate"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("workers", "eval_every", "keep_checkpoints", "start_epoch"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    for name in ("checkpoint_every", "warmup_iters", "max_dets", "max_size", "clip_grad_norm"):
        value = getattr(args, name)
        if value is not None and value < (0 if name == "warmup_iters" else 1e-12):
            parser.error(f"--{name.replace('_', '-')} {value}: must be positive")
    if args.dataset == "coco" and architecture.task == "keypoint":
        parser.error(f"--model {args.model} learns keypoints: use --dataset coco_kp (persons), custom or shapes")
    if architecture.fixed_size is not None and (args.min_size or args.max_size):
        parser.error(f"--min-size and --max-size: {args.model} always resizes to {architecture.fixed_size}")
    if architecture.fixed_size is not None and args.data_augmentation in RESIZING_PRESETS:
        parser.error(
            f"--data-augmentation {args.data_augmentation}: {args.model} always resizes; use ssd, ssdlite or hflip"
        )
    if args.use_copypaste and args.data_augmentation != "lsj":
        parser.error("--use-copypaste needs --data-augmentation lsj")
    if args.use_copypaste and architecture.task != "mask":
        parser.error(f"--use-copypaste pastes masks, which {args.model} does not learn; use a mask model")
    if args.kpt_oks_sigmas and architecture.task != "keypoint":
        parser.error(f"--kpt-oks-sigmas: {args.model} has no keypoints")
    if args.rpn_score_thresh is not None and "rcnn" not in args.model:
        parser.error(f"--rpn-score-thresh: {args.model} has no region proposals")
    if (args.train_images and not args.train_annotations) or (args.val_images and not args.val_annotations):
        parser.error("--train-images and --val-images need --train-annotations and --val-annotations")
    if args.test_only and not (args.resume or args.weights):
        parser.error("--test-only needs a model: --resume CHECKPOINT or --weights NAME")
    try:
        choose_device(args.device)
        if args.weights:
            find_model_weights(args.weights, args.model)
        if args.weights_backbone:
            find_backbone_weights(args.weights_backbone, args.model)
    except ValueError as error:
        parser.error(str(error))


def log_ineffective_flags(args: argparse.Namespace) -> None:
    """Say which given flags change nothing."""
    if args.use_v2 or args.backend != "pil":
        logger.info(
            "--use-v2 and --backend change nothing: there is one pipeline, torchvision's transforms v2 on tensors"
        )
    if args.lr_step_size != 8:
        logger.warning("--lr-step-size has no effect, as in torchvision's scripts; use --lr-steps")
    if args.amp_dtype != "auto" and not args.amp:
        logger.warning("--amp-dtype has no effect without --amp")
    if args.lr_scheduler != "multisteplr" and args.lr_steps != [16, 22]:
        logger.warning("--lr-steps has no effect with --lr-scheduler %s", args.lr_scheduler)
    if args.weights and args.weights_backbone:
        logger.warning("--weights-backbone has no effect: --weights is for the whole model")


class SetUpError(Exception):
    """Something the user can put right, found before training started; the text is for them."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn the errors that set-up raises for users into `SetUpError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SetUpError(str(error)) from error


def data_source(args: argparse.Namespace) -> Source:
    """Return which data the flags name."""
    is_default = args.dataset == "custom" and args.data_path == DEFAULT_DATA_PATH
    paths = {"train": (args.train_images, args.train_annotations), "val": (args.val_images, args.val_annotations)}
    return Source(
        args.dataset,
        Path("custom" if is_default else args.data_path),
        on_bad_data=args.on_bad_data,
        cache_dir=Path(args.cache_dir) if args.cache_dir else None,
        paths=paths,
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
        skip_resize=args.data_augmentation in RESIZING_PRESETS,
        detections_per_img=args.max_dets,
        rpn_score_thresh=args.rpn_score_thresh,
    )


def start_process(args: argparse.Namespace, stop: StopRequest) -> Distributed:
    """Join the other processes and set up signals, log and determinism."""
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    stop.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    with errors_in_one_line():
        distributed = init_distributed(choose_device(args.device), args.dist_url)
    setup_logging(distributed.is_main)
    logger.info("%d process(es) on %s, seed %d", distributed.world_size, distributed.device, args.seed)
    log_ineffective_flags(args)
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return distributed


def build_evaluator(args: argparse.Namespace, data: Data, spec: ModelSpec) -> CocoEvaluator:
    """Return the evaluator of the validation images."""
    return CocoEvaluator(
        data.val.annotations,
        spec.iou_types,
        indices=data.val.indices,
        sigmas=data.sigmas,
        oks_area=args.oks_area,
        max_dets=args.max_dets,
    )


def main(args: argparse.Namespace) -> int:
    """Run what the flags say; returns the exit code."""
    # Processes
    stop = StopRequest()
    distributed = start_process(args, stop)
    device = distributed.device

    with errors_in_one_line():
        # Data
        source = data_source(args)
        output_dir = choose_output_dir(args.output_dir, dataset=args.dataset, model=args.model, root=source.root)
        checkpoint = open_checkpoint(args.resume, output_dir)
        known = checkpoint["dataset"] if checkpoint is not None else None
        task = ARCHITECTURES[args.model].task
        data = load_data(source, task, sigmas=args.kpt_oks_sigmas, known=known, test_only=args.test_only)
        check_same_everywhere("data", data.fingerprint())

        # Model
        seed_torch(args.seed, "weights")
        if checkpoint is not None:
            model, spec = rebuild_model(checkpoint, wanted_spec(args, data))
        else:
            with main_process_first():  # one download per machine
                model, spec = build_start_model(
                    wanted_spec(args, data),
                    weights=args.weights,
                    weights_backbone=args.weights_backbone,
                    trainable_layers=args.trainable_backbone_layers,
                )
        if args.sync_bn and distributed.world_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(device)

        # Evaluation
        val_loader = build_val_loader(data, distributed, batch_size=args.eval_batch_size, workers=args.workers)
        evaluator = build_evaluator(args, data, spec)
    if args.test_only:
        torch.backends.cudnn.deterministic = True
        given_dir = Path(args.output_dir) if args.output_dir else None
        predictions_dir = given_dir if args.save_predictions else None
        scored = score_model(model, val_loader, evaluator, data.label_map, predictions_dir=predictions_dir)
        if given_dir is not None and scored is not None and distributed.is_main:
            append_metrics(given_dir, None, {}, describe_scores(scored.result, scored.report))
        return 0

    with errors_in_one_line():
        # Batches
        train_loader, sampler = build_train_loader(
            data,
            spec,
            distributed,
            batch_size=args.batch_size,
            workers=args.workers,
            seed=args.seed,
            augmentation=args.data_augmentation,
            copy_paste=args.use_copypaste,
            group_factor=args.aspect_ratio_group_factor,
            keep_negatives=keeps_negatives(args),
        )

        # Optimizer and schedule
        learning_rate = build_learning_rate(args, sampler, distributed.world_size)
        optimizer = build_optimizer(
            model,
            args.opt,
            lr=learning_rate.base,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            norm_weight_decay=args.norm_weight_decay,
        )
        amp_dtype, scaler = choose_amp(args.amp_dtype, device) if args.amp else (None, None)
        state = TrainingState(
            model, spec, optimizer, scaler, data, plain_flags(vars(args)), Progress(epoch=args.start_epoch)
        )
        if checkpoint is not None:
            state.restore(checkpoint)
        if distributed.world_size > 1:
            device_ids = [device.index] if device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
        run_dir = output_dir if distributed.is_main else None  # other processes write nothing
        lock = contextlib.nullcontext() if run_dir is None else lock_folder(run_dir)

    # Epochs
    with lock:
        return train_epochs(
            state,
            model,
            train_loader,
            val_loader,
            evaluator,
            learning_rate,
            stop,
            epochs=args.epochs,
            output_dir=run_dir,
            folder=None if run_dir is None else CheckpointFolder(run_dir / "weights", keep=args.keep_checkpoints),
            predictions_dir=output_dir if args.save_predictions else None,
            checkpoint_every=args.checkpoint_every,
            eval_every=args.eval_every,
            seed=args.seed,
            amp_dtype=amp_dtype,
            accumulate=args.accumulate,
            clip_grad_norm=args.clip_grad_norm,
            print_freq=args.print_freq,
            on_nan=args.on_nan,
        )


def keeps_negatives(args: argparse.Namespace) -> bool:
    """Return whether images without objects are trained on."""
    return args.dataset in ("custom", "shapes") if args.keep_negatives is None else args.keep_negatives


def build_learning_rate(args: argparse.Namespace, sampler: GroupedBatchSampler, world_size: int) -> LearningRate:
    """Return the schedule that the flags ask for, and log what an update is made of."""
    images = sampler.batch_size * world_size * args.accumulate
    base = args.lr * images / 16 if args.scale_lr else args.lr
    updates = -(-len(sampler) // args.accumulate)
    warmup = default_warmup(updates) if args.warmup_iters is None else args.warmup_iters
    logger.info(
        "%d images per update (%d per process, %d process(es), %d step(s)), %d updates per epoch, "
        "learning rate %g after %d warm-up updates",
        *(images, sampler.batch_size, world_size, args.accumulate, updates, base, warmup),
    )
    return LearningRate(base, args.epochs, args.lr_scheduler, args.lr_steps, args.lr_gamma, warmup)


def run(argv: list[str] | None = None) -> int:
    """Parse flags, run `main`, and turn expected errors into one line and an exit code."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    try:
        return main(args)
    except NonFiniteLossError as error:
        logger.error("%s", error)
        return EXIT_BAD_LOSS
    except SetUpError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    finally:
        shut_down_distributed()


if __name__ == "__main__":
    sys.exit(run())
