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
from coco_eval import CocoEvaluator
from data_loading import build_train_loader, build_val_loader
from datasets import Data, load_data
from engine import NonFiniteLossError, Progress
from flags import check_args, data_source, get_args_parser, keeps_negatives, log_ineffective_flags, wanted_spec
from group_by_aspect_ratio import GroupedBatchSampler
from models import ARCHITECTURES, ModelSpec
from optimization import LearningRate, build_optimizer, choose_amp, default_warmup
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
from weights import build_start_model

logger = logging.getLogger("train")

EXIT_BAD_LOSS = 3


class SetUpError(Exception):
    """Something the user can put right, found before training started; the text is for them."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn the errors that set-up raises for users into `SetUpError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SetUpError(str(error)) from error


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
            append_metrics(given_dir, None, {}, describe_scores(scored.result, scored.report, scored.intervals))
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
