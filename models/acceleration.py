"""How a model is carried out: memory format, compiled backbone, several processes, profiler. The results stay."""

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import roi_heads

from models.architectures import ModelSpec

logger = logging.getLogger(__name__)

# Steps before a profile begins: allocator, caches and worker start-up are not what it is about.
PROFILE_WARMUP_STEPS = 5
PROFILE_ITEMS = 10

# How often a compiled backbone is timed beside the plain one.
COMPILE_TIMINGS = 3


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Leave the settings of torch and torchvision that a run changes for its whole process as they are found."""
    cudnn, variable = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    chosen = cudnn.deterministic, cudnn.benchmark
    strictness = torch.get_deterministic_debug_mode()
    workspace, cut = os.environ.get(variable), roi_heads.roi_align
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = chosen
        torch.set_deterministic_debug_mode(strictness)
        roi_heads.roi_align = cut  # see `cut_masks_by_kernel`
        os.environ.pop(variable, None)
        if workspace is not None:
            os.environ[variable] = workspace


def use_channels_last(model: nn.Module) -> None:
    """Keep the backbone's convolution weights, and with them its activations, in channels-last order."""
    model.get_submodule("backbone").to(memory_format=torch.channels_last)
    for weight in model.parameters():
        if weight.dim() == 4 and weight.shape[1] == 1:
            # Depthwise: both orders are the same memory, but `to` leaves the strides as they are, and DDP warns where
            # those of the gradient, which come from the activations, are others.
            height, width = weight.shape[2:]
            weight.data = weight.data.as_strided(weight.shape, (height * width, 1, width, 1))


def typical_inputs(spec: ModelSpec, batch_size: int, device: torch.device) -> list[Tensor]:
    """Return inputs for the backbone: float [batch_size, 3, H, W], as batches are after the resize.

    The first is that of 4:3 pictures. Where the model takes other shapes too, a smaller one and an upright one follow.
    """
    if spec.architecture.fixed_size is not None:
        shapes = [spec.architecture.fixed_size]
    else:
        height = spec.min_size[-1] if spec.min_size else spec.architecture.min_size
        width = min(height * 4 // 3, spec.max_size or spec.architecture.max_size)
        height, width = (-(-side // 32) * 32 for side in (height, width))
        shapes = [
            (height, width),
            (max(32, height * 3 // 4 // 32 * 32), -(-width * 7 // 8 // 32) * 32),
            (width, height),
        ]
    return [torch.zeros(batch_size, 3, *shape, device=device) for shape in shapes]


def compile_backbone(model: nn.Module, examples: Sequence[Tensor], amp_dtype: torch.dtype | None) -> bool:
    """Compile the backbone with its feature pyramid, in place, and log what that costs and gains.

    The rest of a detector breaks the graph dozens of times. Where compiling fails, for want of a C++ compiler for
    example, the backbone stays as it was and one line says why. Names in the state dict do not change.

    The compiler meets a second and a third shape here: it then makes code for any shape, which would otherwise happen
    in the middle of a step, inside DDP, where nothing catches a failure.

    Args:
        model: On its device, in training mode or not.
        examples: float [N, 3, H, W] each, see `typical_inputs`; the first is timed.
        amp_dtype: Autocast to this type, or None.

    Returns:
        Whether the backbone is compiled.
    """
    backbone = model.get_submodule("backbone")
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}

    def seconds(example: Tensor = examples[0]) -> float:
        """Time one forward and backward."""
        if example.device.type == "cuda":
            torch.cuda.synchronize(example.device)
        start = time.perf_counter()
        with torch.autocast(example.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            features = backbone(example)
        if any(feature.requires_grad for feature in features.values()):
            sum(feature.float().mean() for feature in features.values()).backward()
        if example.device.type == "cuda":
            torch.cuda.synchronize(example.device)
        return time.perf_counter() - start

    try:
        seconds()
        plain = min(seconds() for _ in range(COMPILE_TIMINGS))
        backbone.compile()
        first = sum(seconds(example) for example in examples)
        compiled = min(seconds() for _ in range(COMPILE_TIMINGS))
    except Exception as error:  # dynamo, inductor, Triton and the C++ compiler all have errors of their own
        backbone._compiled_call_impl = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning("--compile: the backbone cannot be compiled here and stays as it is: %s", reason)
        return False
    finally:
        for name, buffer in backbone.named_buffers():
            buffer.copy_(buffers[name])
        backbone.zero_grad(set_to_none=True)
    text = "backbone compiled in %.0f s; forward and backward of %s take %.1f ms instead of %.1f ms (%.2fx)"
    logger.info(text, first, list(examples[0].shape), compiled * 1e3, plain * 1e3, plain / compiled)
    return True


def distribute(model: nn.Module, accumulate: int = 1) -> nn.Module:
    """Return ``model`` in DDP where there are several processes, else as it is.

    Every loss reaches every trainable parameter in every step, empty images included, so the graph is static.
    Running statistics of norms play no part in a training step: they are not broadcast each time but once before
    they are used, by `broadcast_buffers`; the first process's are what a broadcast per step would leave.
    DDP is not told the device: batches are there already, and it would walk through them and build new lists, without
    the block of objects that `BatchTargets` carry.

    Args:
        model: On its device; a GPU of this process's own with CUDA.
        accumulate: Steps per update.
    """
    if not dist.is_initialized():
        return model
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    syncs_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    options: dict[str, Any] = {syncs_buffers: False}
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        **options,
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,  # DDP does not support it together with no_sync
    )
    _settle_buckets(wrapped)
    return wrapped


class _SumOfParameters(nn.Module):
    """Reaches every trainable parameter of a model, without its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def forward(self) -> Tensor:
        """Return the sum of all."""
        return torch.stack([p.sum() for p in self._trained]).sum()


def _settle_buckets(wrapped: nn.parallel.DistributedDataParallel) -> None:
    """Let DDP send the gradients of the first step in the same pieces as those of all later steps.

    It sends them in one piece at first, notes in which order they come (with a static graph, in its second pass), and
    then cuts them into buckets. The place of a gradient in its piece decides in which order three or more processes add
    it, so a run that is continued would add in another order than one that goes on, and end with other last digits.
    Here two passes without meaning go first. Gradients come in the reverse order of registration, as they about do in
    training.
    """
    model = wrapped.module
    wrapped.module = _SumOfParameters(model)
    for _ in range(2):
        wrapped().backward()
    wrapped.module = model
    model.zero_grad()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers, such as the running statistics of batch norms."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def profile_steps(steps: int, folder: Path | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile so many training steps and log the largest items; yields what is to be called after every step.

    Args:
        steps: How many; 0 profiles nothing.
        folder: Where ``trace.json`` goes, which chrome://tracing and https://ui.perfetto.dev open; None writes none.
        device: What training runs on; items are sorted by the time they take there.
    """
    if not steps:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def report(profiler: torch.profiler.profile) -> None:
        """Log the largest items and write the trace."""
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        averages = profiler.key_averages()
        table = averages.table(sort_by=key, row_limit=PROFILE_ITEMS, max_name_column_width=45)
        logger.info("profile of %d steps, the %d largest items:\n%s", steps, PROFILE_ITEMS, table)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / "trace.json"))
            logger.info("the trace is in %s", folder / "trace.json")

    schedule = torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP_STEPS, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=report) as profiler:
        yield profiler.step


def cut_masks_by_kernel() -> None:
    """Let Mask R-CNN's loss cut its target masks out by roi_align's own kernel, also in deterministic runs.

    torchvision takes Python code instead where deterministic algorithms are asked for on a GPU, which samples every
    mask at full size: some 335 GB for 512 boxes on an 800 x 1333 picture. Only the kernel's gradient varies from run to
    run, and target masks have none. The name is that of torchvision's module, hence changed for the whole process.
    """

    def roi_align(masks: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float) -> Tensor:
        height, width = output_size
        return torch.ops.torchvision.roi_align(masks, rois, spatial_scale, height, width, -1, False)

    roi_heads.roi_align = roi_align
