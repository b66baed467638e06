"""A run that is interrupted and continued is the run that never stopped, to the last bit; tolerance 0 everywhere."""

import itertools
import multiprocessing

import pytest
import torch
from torch import nn

import train
from group_by_aspect_ratio import GroupedBatchSampler
from helpers.drawn import draw_coco
from helpers.ranks import run_on_ranks
from helpers.runs import QUICK, run, run_train, train_once
from helpers.thin import use_thin_models
from models import weights
from models.acceleration import broadcast_buffers
from runtime import checkpoint, saved_model
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.trackers import Tracker
from training.state import TrainingState
from training.verify_resume import hash_state
from utils import Distributed

pytestmark = pytest.mark.usefixtures("restore_process")

CPU = torch.device("cpu")
AMP = {"none": [], "bfloat16": ["--amp", "--amp-dtype", "bfloat16"], "float16": ["--amp", "--amp-dtype", "float16"]}


class TinyDetector(nn.Module):
    """Has what makes resuming hard in torchvision's detectors: batch norm, random sampling, sizes that differ."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 5)

    def forward(self, images, targets=None):
        features = torch.cat([nn.functional.interpolate(image[None], (32, 32)) for image in images])
        outputs = self.head(self.body(features).mean(dim=(2, 3)))
        boxes = torch.cat([t["boxes"] for t in targets]).float()
        chosen = torch.randperm(len(boxes))[: max(1, len(boxes) // 2)]  # as RPN and RoI heads sample
        wanted = (boxes[chosen] / 100).mean(dim=0) if len(boxes) else torch.zeros(4)
        return {
            "loss_classifier": outputs[:, 4].float().square().mean(),
            "loss_box_reg": (outputs[:, :4].float().mean(dim=0) - wanted).square().sum(),
        }


def use_tiny_detector(patch):
    for module in (weights, saved_model):
        patch.setattr(module, "build_model", lambda spec: TinyDetector())


def flags_of(root, point, workers, amp, preset="hflip", group=3, batch=2, warmup=4):
    flags = ["--data-path", root, "--model", "ssdlite320_mobilenet_v3_large", "--device", "cpu", "--epochs", 4]
    flags += ["--batch-size", batch, "--workers", workers, "--lr", 0.05, "--warmup-iters", warmup, "--verify-resume"]
    flags += [
        2 * point,
        "--data-augmentation",
        preset,
        "--aspect-ratio-group-factor",
        group,
        "--print-freq",
        100,
        *AMP[amp],
    ]
    return [str(flag) for flag in flags]


# Six batches per epoch in one process: inside the warm-up, just after it, between two epochs, in the second epoch.
POINTS = (1, 4, 6, 8)
QUICK_CASES = [
    (1, 0, "none", "hflip", 3),
    (4, 2, "bfloat16", "hflip", -1),
    (6, 3, "float16", "ssdlite", 3),
    (8, 2, "none", "ssd", 0),
]
# Every point with every number of workers and every precision; grouped batches and others take turns.
ALL_CASES = [
    (*case, "hflip", (3, -1)[n % 2]) for n, case in enumerate(itertools.product(POINTS, (0, 2, 3), AMP))
]  # fmt: skip
ALL_CASES += [
    (point, workers, "none", preset, 3)
    for point, workers, preset in itertools.product(POINTS, (0, 2), ("ssd", "ssdlite"))
]
# Every pair of point, number of workers and precision: what two processes add has no part in how the three meet.
PAIRS = [
    (point, workers, list(AMP)[(i + k) % 3], "hflip", (3, -1)[(i + k) % 2])
    for i, point in enumerate(POINTS)
    for k, workers in enumerate((0, 2, 3))
]
PAIRS += [
    (1, 2, "none", "ssd", 3),
    (6, 0, "none", "ssd", 3),
    (4, 0, "none", "ssdlite", 3),
    (8, 2, "none", "ssdlite", 3),
]


def check_cases(root, cases):
    failed = [case for case in cases if run(*flags_of(root, *case)) != 0]
    assert failed == []


@pytest.mark.slow
def test_resuming_is_exact_on_one_process(drawn_coco, monkeypatch):
    use_tiny_detector(monkeypatch)
    check_cases(drawn_coco, QUICK_CASES)


@pytest.mark.slow
def test_resuming_is_exact_at_every_point_with_any_workers_and_precision(tmp_path, monkeypatch):
    use_tiny_detector(monkeypatch)
    check_cases(draw_coco(tmp_path / "coco", num_images=12), ALL_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lsj", "multiscale"])
def test_resuming_is_exact_with_presets_that_resize(drawn_coco, monkeypatch, preset):
    use_thin_models(monkeypatch)
    flags = ["--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--min-size", "64", "--max-size", "96"]
    assert run(*flags_of(drawn_coco, 1, 0, "none", preset), *flags, "--lr", "0.001") == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_resuming_is_exact_for_masks_and_keypoints(tmp_path, monkeypatch, task):
    use_thin_models(monkeypatch)
    root = draw_coco(tmp_path / "coco", num_images=4, num_keypoints=17 if task == "keypoint" else 0)
    flags = ["--model", f"{task}rcnn_resnet50_fpn", "--min-size", "48", "--max-size", "64", "--lr", "0.001"]
    flags += ["--dataset", "coco_kp"] if task == "keypoint" else ["--data-augmentation", "lsj", "--use-copypaste"]
    assert run(*flags_of(root, 1, 0, "none"), *flags) == 0


def _verify_on_rank(rank, world_size, root, cases):
    multiprocessing.set_start_method("fork", force=True)  # for loading processes, as in a run of its own
    patch = pytest.MonkeyPatch()
    use_tiny_detector(patch)
    parser = train.get_args_parser()
    codes = []
    for case in cases:
        args = parser.parse_args(flags_of(root, *case))
        train.check_args(parser, args)
        codes.append(train.verify_resume(args, Distributed(rank, rank, world_size, CPU), StopRequest()))
    patch.undo()
    return codes


def _share_on_rank(rank, world_size, root, cases):
    """Let the running statistics differ as after a step, and share them."""
    model = TinyDetector()
    model.body[1].running_mean.fill_(rank)
    broadcast_buffers(model)
    return float(model.body[1].running_mean.sum()), _verify_on_rank(rank, world_size, root, cases)


@pytest.mark.slow
def test_resuming_is_exact_on_two_processes(tmp_path):
    root = draw_coco(tmp_path / "coco", num_images=14)  # seven batches: the last step repeats one with weight 0
    assert run_on_ranks(2, _share_on_rank, root, QUICK_CASES) == [(0.0, [0] * len(QUICK_CASES))] * 2


@pytest.mark.slow
def test_resuming_is_exact_on_two_processes_at_every_point_with_any_workers_and_precision(tmp_path):
    root = draw_coco(tmp_path / "coco", num_images=14)
    assert run_on_ranks(2, _verify_on_rank, root, PAIRS) == [[0] * len(PAIRS)] * 2


@pytest.mark.slow
def test_verify_resume_works_under_torchrun_and_writes_nothing(drawn_coco, tmp_path):
    flags = ["--data-path", drawn_coco, "--model", "ssdlite320_mobilenet_v3_large", "--device", "cpu", "--workers", "1"]
    flags += ["--batch-size", "2", "--verify-resume", "4", "--output-dir", tmp_path / "out"]
    done = run_train(*flags, processes=2, env={"TMPDIR": str(tmp_path)})
    assert done.stdout.rstrip().endswith("equal") and "NOT" not in done.stdout
    hashes = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("uninterrupted", "continued"))]
    assert len(hashes) == 2 and hashes[0] == hashes[1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("verify-resume-*"))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["optimizer", "updates", "losses"])
def test_the_check_notices_what_a_resume_loses(drawn_coco, monkeypatch, capsys, lost):
    use_tiny_detector(monkeypatch)
    restore = TrainingState.restore

    def forgetful(self, content):
        if lost == "updates":
            content["progress"]["updates"] -= 1
        momentum = self.optimizer.state_dict()
        restore(self, content)
        if lost == "optimizer":
            self.optimizer.load_state_dict(momentum)
        if lost == "losses":
            with torch.no_grad():
                next(self.model.parameters()).mul_(1.0000001)

    monkeypatch.setattr(TrainingState, "restore", forgetful)
    assert run(*flags_of(drawn_coco, 3, 0, "none")) == 1
    assert "NOT equal: do not rely on resuming" in capsys.readouterr().out


def test_hashes_differ_in_a_bit_a_type_and_a_name():
    value = {"a": torch.tensor([1.0, 2.0]), "b": [1, 0.5, None]}
    others = [
        {"a": torch.tensor([1.0, 2.0000002]), "b": [1, 0.5, None]},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": [1, 0.5, None]},
        {"c": torch.tensor([1.0, 2.0]), "b": [1, 0.5, None]},
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 0.25, None]},
    ]
    assert len({hash_state(v) for v in (value, *others)}) == 5
    assert hash_state(value) == hash_state({"a": torch.tensor([1.0, 2.0]), "b": [1, 0.5, None]})


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 3), (3, 2, 1)])
@pytest.mark.parametrize("num_images", [24, 25, 31])
def test_each_sample_of_an_epoch_comes_once_whatever_the_processes(worlds, num_images):
    """The run is interrupted after two steps each time and continued with another number of processes."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(50, 100, (2, num_images), generator=rng).numpy()
    seen, progress = [], Progress()
    for number, world in enumerate(worlds):
        samplers = [
            GroupedBatchSampler(*sizes, group_factor=3, batch_size=2, seed=1, rank=rank, world_size=world)
            for rank in range(world)
        ]
        for sampler in samplers:
            sampler.set_epoch(0, progress.batches)
        steps = len(samplers[0]) if number == len(worlds) - 1 else 2
        for sampler in samplers:
            for step, batch in enumerate(itertools.islice(sampler, steps)):
                if sampler.weight(step):
                    seen += [index for _, index in batch]
        progress.batches = samplers[0].done_after(steps)
    assert progress.batches == num_images // 2
    assert len(seen) == len(set(seen)) == num_images // 2 * 2


def stopped_inside_epoch(root, out):
    """Train until after the first of three updates, as if asked to stop there."""
    parser = train.get_args_parser()
    flags = [*QUICK, "--data-path", root, "--model", "ssdlite320_mobilenet_v3_large", "--batch-size", "2"]
    args = parser.parse_args([str(f) for f in (*flags, "--output-dir", out)])
    stop = StopRequest()
    stop_after_first = Tracker()
    stop_after_first.on_step = lambda record: setattr(stop, "signal_name", "SIGTERM")
    assert train.main(args, Distributed(0, 0, 1, CPU), stop, [stop_after_first]) == 0
    return [*flags, "--output-dir", out, "--resume", "auto"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "3"], "after batch 1 of epoch 0.*batch size 2, now 3.*samples would be lost or repeated"),
        (["--aspect-ratio-group-factor", "-1"], "groups 3, now -1"),
        (["--seed", "5"], "seed 0, now 5"),
        (["--repeat-threshold", "1"], r"repeat factors None, now \w{16}"),
    ],
)
def test_going_on_inside_an_epoch_with_other_batches_is_refused(
    drawn_coco, tmp_path, monkeypatch, capsys, change, message
):
    import re

    use_tiny_detector(monkeypatch)
    flags = stopped_inside_epoch(drawn_coco, tmp_path / "out")
    assert run(*flags, "--eval-every", "0", *change) == 1
    assert re.search(message, capsys.readouterr().err)
    assert run(*flags, "--eval-every", "0") == 0


@pytest.mark.slow
def test_settings_that_move_the_last_digits_are_named_in_one_line(drawn_coco, tmp_path, monkeypatch, capsys):
    use_tiny_detector(monkeypatch)
    flags = stopped_inside_epoch(drawn_coco, tmp_path / "out")
    path = tmp_path / "out" / "weights" / "checkpoint.pth"
    content = checkpoint.load_checkpoint(path)
    content["world_size"], content["num_threads"], content["versions"]["torch"] = 2, 64, "2.9.0"
    checkpoint.save_checkpoint(content, path)
    capsys.readouterr()
    assert run(*flags, "--eval-every", "0", "--amp") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "continuing with other settings" in line]
    for part in (
        "processes 2, now 1",
        "threads 64, now 1",
        "torch 2.9.0, now",
        "--amp False, now True",
        "last digits",
    ):
        assert part in line


@pytest.mark.slow
def test_an_evaluation_that_was_interrupted_is_made_up(drawn_coco, tmp_path, monkeypatch):
    """A stop in the last evaluation: the continued run has nothing to train, and scores."""
    from helpers.runs import lines
    from training import evaluate_model

    out, flags = tmp_path / "out", ["--batch-size", "3"]

    def interrupted(*args, stop, **kwargs):
        stop.signal_name = "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_model, "evaluate", interrupted)
        train_once(drawn_coco, out, *flags)
    assert "bbox" not in lines(out)[0]
    train_once(drawn_coco, out, *flags, "--resume", "auto")
    whole = tmp_path / "whole"
    train_once(drawn_coco, whole, *flags)
    (made_up,), (straight,) = lines(out), lines(whole)
    assert made_up["bbox"] == straight["bbox"] and made_up["train"]["loss"] == straight["train"]["loss"]
