"""Train and evaluate torchvision's detectors.

One device, whose rate --scale-lr works out from the recipe's for eight:
    python train.py --dataset coco --data-path /data/coco --model fasterrcnn_resnet50_fpn \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --scale-lr --output-dir runs/first
Several GPUs, and CPUs as well:
    torchrun --nproc_per_node=8 train.py --dataset coco --data-path /data/coco --model fasterrcnn_resnet50_fpn \\
        --weights-backbone ResNet50_Weights.IMAGENET1K_V1 --output-dir runs/first
Only evaluate; the checkpoint knows its model:
    python train.py --dataset coco --data-path /data/coco --test-only --resume runs/first/weights/best.pth
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loading: an end without a traceback

import argparse
import datetime
import logging
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coco_eval import CocoEvaluator
from engine import train_one_epoch
from flag_checks import check_args, log_ineffective_flags
from flags import data_source, get_args_parser, keeps_negatives, take_model_from_checkpoint, wanted_spec
from group_by_aspect_ratio import GroupedBatchSampler
from inference.tiles import Tiling
from loading.loaders import DeviceLoader, build_train_loader, build_val_loader
from loading.splits import Data, load_data
from loading.trainable import check_against_model
from models.acceleration import (
    broadcast_buffers,
    compile_backbone,
    cut_masks_by_kernel,
    distribute,
    kept_settings,
    profile_steps,
    typical_inputs,
    use_channels_last,
)
from models.architectures import ARCHITECTURES, ModelSpec
from models.batched_step import use_batched_step
from models.box_precision import keep_boxes_float32
from models.folded_norm import fold_frozen_norms
from models.narrow_maps import widen_narrow_maps
from models.weights import build_start_model
from optimization.optimizer import build_optimizer
from optimization.precision import choose_amp
from optimization.schedule import LearningRate, default_warmup
from optimization.step import StepOptions
from optimization.weight_average import WeightAverage
from process.leaving import end_process
from process.waiting import EXIT_SIGNAL, Stopped, note_signal
from report.page import publish
from runtime.checkpoint import BEST, CheckpointError, open_checkpoint
from runtime.machine import explain_failure
from runtime.progress import Progress
from runtime.run_folder import RunFolder, choose_output_dir, plain_flags
from runtime.saved_model import rebuild_model
from runtime.signals import StopRequest, agree_to_stop
from runtime.step_guard import NonFiniteLossError
from runtime.trackers import CallEachStep, LastScores, Tracker, append_metrics
from training.evaluate_model import EvalSetup, evaluate_model
from training.run_plan import Plan, rehearse
from training.start_up import SetUpError, errors_in_one_line, start_process
from training.state import EndOfUpdate, TrainingState
from training.verify_resume import Probe, ResumeCheckError, check_resume
from utils import (
    Distributed,
    check_same_everywhere,
    main_process_first,
    meet,
    print_error,
    rank,
    seed_torch,
    shut_down_distributed,
)

logger = logging.getLogger("train")

EXIT_BAD_LOSS = 3


class RunError(Exception):
    """A run that was called from Python has failed; its log says why."""


def main(
    args: argparse.Namespace, distributed: Distributed, stop: StopRequest, trackers: Sequence[Tracker] = ()
) -> int:
    """Run what the flags say; returns the exit code.

    Args:
        args: The flags.
        distributed: This process.
        stop: Its wish to stop.
        trackers: Told of every step, see `train_one_epoch`.
    """
    device = distributed.device

    with errors_in_one_line():
        # Data
        source = data_source(args)
        output_dir = choose_output_dir(args.output_dir, dataset=args.dataset, model=args.model, root=source.root)
        checkpoint, resumed_from = open_checkpoint(args.resume, output_dir)
        known = checkpoint["dataset"] if checkpoint is not None else None
        task = ARCHITECTURES[args.model].task
        data = load_data(source, task, sigmas=args.kpt_oks_sigmas, known=known, test_only=args.test_only)
        check_same_everywhere("data", data.fingerprint())

        # Model
        bare_model, spec = start_model(args, data, checkpoint, distributed)
        data = check_against_model(data, spec, args.on_bad_data)
        eval_setup = build_eval_setup(args, data, spec, distributed)
    if args.test_only:
        return evaluate_only(args, data, bare_model, eval_setup, stop, trackers)

    with errors_in_one_line():
        # Batches, schedule, optimizer
        train_loader, sampler = build_batches(args, data, spec, distributed)
        learning_rate = build_learning_rate(args, sampler)
        options = build_step_options(args, device, output_dir)
        state = build_state(args, data, bare_model, spec, learning_rate.base, options.scaler, sampler.to_plain())
        if checkpoint is not None:
            state.restore(checkpoint)
        if args.compile:
            compile_backbone(bare_model, typical_inputs(spec, sampler.batch_size, device), options.amp_dtype)
        meet("are not ready for the first step yet")
        model = distribute(bare_model, args.accumulate)

        # Plan
        plan = Plan(state, train_loader, learning_rate, args.accumulate, output_dir, args.keep_checkpoints)
        logger.info("%s", plan.format_lines())
        plan.check_output()
        if args.dry_run:
            logger.info("%s", rehearse(plan, model, options))
            return 0
        output = RunFolder(output_dir, args.keep_checkpoints, resumed_from=resumed_from)
        state.reset_stale_best(output.best_epoch())
        output.write_args(state.flags)

    # Epochs
    progress, started = state.progress, time.monotonic()
    predictions_dir = output_dir if args.save_predictions else None
    with profile_steps(args.profile if distributed.is_main else 0, output_dir, device) as end_step:
        end_of_update = EndOfUpdate(state, output, args.checkpoint_every)
        trackers = [*trackers, *output.trackers, CallEachStep(end_step), end_of_update]
        while not agree_to_stop(stop):
            if progress.eval_due:
                broadcast_buffers(state.scored_model)
                evaluation = evaluate_model(state.scored_model, eval_setup, stop=stop, predictions_dir=predictions_dir)
                if evaluation is None:  # asked to stop meanwhile: the evaluation starts again when the run is continued
                    continue
                epoch, is_best = progress.epoch - 1, state.end_evaluation(evaluation.to_plain(), args.best_metric)
                for tracker in trackers:
                    tracker.on_scores(epoch, state.averages, state.metrics)
                if output.path is not None and distributed.is_main:
                    publish(output.path, eval_setup.evaluator, evaluation, data.val, epoch, predictions_dir, is_best)
                output.save(state.content(), epoch_done=epoch, is_best=is_best)
            if progress.epoch >= args.epochs or state.is_stale(args.early_stop):
                return finish(args, state, output, time.monotonic() - started)
            sampler.set_epoch(progress.epoch, progress.batches)
            averages = train_one_epoch(
                model,
                state.optimizer,
                train_loader,
                progress=progress,
                learning_rate=learning_rate,
                options=options,
                stop=stop,
                trackers=trackers,
            )
            epoch_done = state.end_epoch(averages, sampler.num_batches, args.eval_every, args.epochs)
            if epoch_done is not None:
                for tracker in trackers:
                    tracker.on_epoch(epoch_done, state.averages)
            output.save(state.content(), epoch_done=epoch_done)
    logger.info("asked to stop: %s%s", state.where_stopped(), ", NOT saved" if output.last_save_failed else "")
    return int(output.last_save_failed)


def finish(args: argparse.Namespace, state: TrainingState, output: RunFolder, seconds: float) -> int:
    """Say how the training ended; returns the exit code."""
    if state.is_stale(args.early_stop):
        logger.info("no better evaluation in the last %d: stopping early", args.early_stop)
    logger.info("training took %s", datetime.timedelta(seconds=int(seconds)))
    if state.best and output.path is not None:
        best = output.path / "weights" / BEST
        logger.info("best epoch: %d; python predict.py --checkpoint %s PICTURES", state.best["epoch"], best)
    if output.last_save_failed:
        logger.error("the end of the training is NOT saved: the last checkpoint could not be written")
    return int(output.last_save_failed)


def start_model(
    args: argparse.Namespace, data: Data, checkpoint: dict[str, Any] | None, distributed: Distributed
) -> tuple[nn.Module, ModelSpec]:
    """Return the model that the run starts from, on its device, and its record."""
    wanted = wanted_spec(args, data)
    seed_torch(args.seed, "weights")
    if checkpoint is not None:
        model, spec = rebuild_model(checkpoint, wanted, averaged=args.test_only)
    else:
        with main_process_first("read the weights first, on each machine"):  # one download per machine
            model, spec = build_start_model(
                wanted,
                weights=args.weights,
                weights_backbone=args.weights_backbone,
                trainable_layers=args.trainable_backbone_layers,
            )
    if args.sync_bn and distributed.world_size > 1:
        if distributed.device.type != "cuda":
            raise ValueError(f"--sync-bn: torch has it for CUDA only, and this run is on {distributed.device}")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(distributed.device)
    fold_frozen_norms(model)
    if not args.torchvision_step:
        use_batched_step(model)
    if args.channels_last:
        use_channels_last(model)
    if args.amp:
        keep_boxes_float32(model)
        if distributed.device.type == "cpu":
            widen_narrow_maps(model)
    if args.use_deterministic_algorithms:
        cut_masks_by_kernel()
    # Trying out convolution algorithms pays where all batches have one shape, and costs where they do not.
    torch.backends.cudnn.benchmark = spec.architecture.fixed_size is not None and not (
        args.test_only or args.use_deterministic_algorithms
    )
    return model, spec


def build_eval_setup(args: argparse.Namespace, data: Data, spec: ModelSpec, distributed: Distributed) -> EvalSetup:
    """Return what models are scored on."""
    options = {"batch_size": args.eval_batch_size, "workers": args.workers}
    loss_loader = None
    if args.val_loss and not args.test_only:
        loss_loader = build_val_loader(data, distributed, task=spec.architecture.task, **options)
    evaluator = CocoEvaluator(
        data.val.annotations,
        spec.iou_types,
        indices=data.val.indices,
        sigmas=data.sigmas,
        oks_area=args.oks_area,
        max_dets=args.max_dets,
    )
    tiling = Tiling.of_flags(args.tile, args.overlap, args.eval_batch_size)
    if tiling is not None:
        logger.info("scored on %s", tiling)
    return EvalSetup(build_val_loader(data, distributed, **options), evaluator, data.label_map, loss_loader, tiling)


def evaluate_only(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    eval_setup: EvalSetup,
    stop: StopRequest,
    trackers: Sequence[Tracker],
) -> int:
    """Score the model; results are written only where ``--output-dir`` is given."""
    torch.backends.cudnn.deterministic = True
    folder = Path(args.output_dir) if args.output_dir else None
    predictions_dir = folder if args.save_predictions else None
    evaluation = evaluate_model(model, eval_setup, stop=stop, predictions_dir=predictions_dir)
    if evaluation is None:  # asked to stop
        return 0
    scores = evaluation.to_plain()
    for tracker in trackers:
        tracker.on_scores(None, {}, scores)
    if folder is not None and rank() == 0:
        append_metrics(folder, None, {}, scores)
        publish(folder, eval_setup.evaluator, evaluation, data.val, None, predictions_dir)
    return 0


def build_batches(
    args: argparse.Namespace, data: Data, spec: ModelSpec, distributed: Distributed
) -> tuple[DeviceLoader, GroupedBatchSampler]:
    """Return the training batches, and which images are in them."""
    return build_train_loader(
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
        repeat_threshold=args.repeat_threshold,
    )


def build_learning_rate(args: argparse.Namespace, sampler: GroupedBatchSampler) -> LearningRate:
    """Return the schedule that the flags ask for."""
    base = args.lr
    if args.scale_lr:
        base *= sampler.batch_size * sampler.world_size * args.accumulate / 16
    updates = -(-len(sampler) // args.accumulate)
    warmup = default_warmup(updates) if args.warmup_iters is None else args.warmup_iters
    return LearningRate(base, args.epochs, args.lr_scheduler, args.lr_steps, args.lr_gamma, warmup)


def build_step_options(args: argparse.Namespace, device: torch.device, output_dir: Path | None) -> StepOptions:
    """Return how the steps of the run go."""
    amp_dtype, scaler = choose_amp(args.amp_dtype, device) if args.amp else (None, None)
    return StepOptions(
        seed=args.seed,
        amp_dtype=amp_dtype,
        scaler=scaler,
        accumulate=args.accumulate,
        clip_grad_norm=args.clip_grad_norm,
        on_nan=args.on_nan,
        print_freq=args.print_freq,
        debug_folder=output_dir,
    )


def build_state(
    args: argparse.Namespace,
    data: Data,
    model: nn.Module,
    spec: ModelSpec,
    base_lr: float,
    scaler: torch.amp.GradScaler | None,
    order: dict[str, Any],
) -> TrainingState:
    """Return the run at its start: optimizer and averaged weights for a bare model."""
    optimizer = build_optimizer(
        model,
        args.opt,
        lr=base_lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        norm_weight_decay=args.norm_weight_decay,
    )
    average = WeightAverage(model, args.ema) if args.ema else None
    flags, start = plain_flags(vars(args)), Progress(epoch=args.start_epoch)
    return TrainingState(model, spec, optimizer, scaler, average, data, flags, order, start)


def verify_resume(args: argparse.Namespace, distributed: Distributed, stop: StopRequest) -> int:
    """Prove on the user's own data and flags that resuming changes nothing; returns 0 if so, else 1."""
    stop.remove()  # there is nothing to save

    def train(output_dir: str, resume: str, probe: Probe) -> int:
        changes = {"output_dir": output_dir, "resume": resume, "eval_every": 0, "dry_run": False}
        return main(argparse.Namespace(**{**vars(args), **changes}), distributed, probe, [probe])

    try:
        same = check_resume(train, args.resume, args.verify_resume)
    except (CheckpointError, ResumeCheckError) as error:
        raise SetUpError(str(error)) from error
    logger.info("equal" if same else "NOT equal: do not rely on resuming with these flags")
    if not same and distributed.device.type == "cuda" and not args.use_deterministic_algorithms:
        logger.info("GPU kernels may add in another order each time: --use-deterministic-algorithms rules that out")
    return 0 if same else 1


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Do what the flags say, for a program or a notebook; may be called several times in one process.

    Signal handlers and what flags set for all of torch are afterwards as before.

    Returns:
        The figures of the last evaluation, as in a line of ``metrics.jsonl``: ``run([...])["bbox"]["AP"]``; empty
        without an evaluation.

    Raises:
        SetUpError: Something that the flags or files must put right, and the run has not started.
        NonFiniteLossError: A loss or gradient was not finite.
        RunError: The run has ended with another code than 0; its log says why.
        SystemExit: The flags are wrong.
    """
    last = LastScores()
    stop = StopRequest()
    try:
        with kept_settings():
            if code := _run(argv, stop, [last]):
                raise RunError(f"train.py has ended with {code}; the lines above say why")
    finally:
        stop.remove()
    return last.scores


def _run(argv: Sequence[str] | None, stop: StopRequest, trackers: Sequence[Tracker]) -> int:
    """Parse flags and run `main`; returns the exit code.

    The process group is left in good order only after success: NCCL's way out waits for all other processes, and where
    this one has failed they wait for it.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv)
    take_model_from_checkpoint(args)
    check_args(parser, args)
    deterministic = args.use_deterministic_algorithms
    distributed = start_process(stop, device=args.device, dist_url=args.dist_url, deterministic=deterministic)
    logger.info("%d process(es) on %s, seed %d", distributed.world_size, distributed.device, args.seed)
    log_ineffective_flags(args)
    code = verify_resume(args, distributed, stop) if args.verify_resume else main(args, distributed, stop, trackers)
    shut_down_distributed()
    return code


def run_as_command(argv: Sequence[str] | None = None) -> int:
    """Do what the flags say, and turn expected errors into one line and an exit code."""
    try:
        return _run(argv, StopRequest(), [])
    except NonFiniteLossError as error:
        logger.error("%s", error)
        return EXIT_BAD_LOSS
    except SetUpError as error:
        print_error(f"train.py: error: {error}")
        return 1
    except Stopped as stopped:
        print_error(f"train.py: {stopped}; nothing was trained")
        return 0
    except Exception as error:
        explained = explain_failure(error)
        if explained is None:
            raise
        print_error(f"train.py: error: {explained}")
        return 1
    finally:
        note_signal(None)


def run_and_leave(argv: Sequence[str] | None = None) -> None:
    """Run as a command, and end the process at once with the exit code; after a bug with its traceback and 1."""
    try:
        code = run_as_command(argv)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        code = 1 if isinstance(error, Exception) else EXIT_SIGNAL + signal.SIGINT
    end_process(code)


if __name__ == "__main__":
    run_and_leave()
