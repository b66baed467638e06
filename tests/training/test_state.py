"""What a run keeps beside its weights: the best evaluation, averaged weights, validation losses, its plan."""

import copy
import datetime
import json
import logging
import re
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import train
from engine import validation_loss
from group_by_aspect_ratio import EvalBatchSampler
from helpers.ranks import run_on_ranks
from helpers.runs import run
from helpers.toy import ToyLoader
from models.architectures import ModelSpec, build_model
from models.batched_step import use_batched_step
from optimization.optimizer import build_optimizer
from optimization.schedule import LearningRate
from optimization.weight_average import WeightAverage
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.progress import Progress
from runtime.saved_model import rebuild_model
from runtime.trackers import append_metrics
from training import run_plan
from training.state import TrainingState, is_checkpoint_due
from utils import format_peak_memory

pytestmark = pytest.mark.usefixtures("restore_process")

TWO_MINUTES = datetime.timedelta(minutes=2)


def state_with(values):
    """Yield a state after each evaluation with the given AP and a fixed interval around it."""
    state = TrainingState(None, None, None, None, None, None, {}, {}, Progress())
    for epoch, value in enumerate(values):
        state.progress.epoch = epoch + 1
        interval = None if value is None else [value - 0.1, value + 0.1]
        state.metrics = {"bbox": {"AP": value}, "intervals": {"bbox": {"AP": interval}}}
        yield state


def test_the_best_evaluation_is_kept_and_counted(caplog):
    caplog.set_level(logging.INFO)
    found = [
        (state.update_best("bbox/AP"), state.best["epoch"], state.best["since"])
        for state in state_with([0.3, 0.2, 0.25, 0.6, 0.6])
    ]
    assert found == [(True, 0, 0), (False, 0, 1), (False, 0, 2), (True, 3, 0), (False, 3, 1)]
    lines = [record.getMessage() for record in caplog.records]
    assert "within" in lines[1]  # 0.2 against 0.3 +- 0.1
    assert "0.6000 of epoch 3, against 0.3000 of epoch 0" in lines[3] and "within" not in lines[3]


def test_a_best_epoch_that_the_folder_does_not_hold_is_forgotten(caplog):
    state = list(state_with([0.3, 0.2]))[-1]
    state.update_best("bbox/AP")
    known = dict(state.best)
    state.reset_stale_best(known["epoch"])
    assert state.best == known and "chosen anew" not in caplog.text
    state.reset_stale_best(known["epoch"] + 4)
    assert state.best == {} and "chosen anew" in caplog.text


def test_an_evaluation_without_a_figure_is_no_best():
    (state,) = state_with([None])
    assert not state.update_best("bbox/AP") and state.best == {}


@pytest.mark.parametrize(("every", "epochs", "scored"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (0, 3, []), (9, 3, [3])])
def test_evaluations_are_due(every, epochs, scored):
    (state,) = state_with([0.5])
    state.optimizer = build_optimizer(nn.Linear(1, 1), "sgd", lr=0.1, momentum=0.9, weight_decay=0)
    due = []
    for epoch in range(epochs):
        state.progress = Progress(epoch=epoch, batches=4)
        assert state.end_epoch({"loss": 1.0}, num_batches=5, eval_every=every, epochs=epochs) is None
        state.progress.batches = 5
        assert state.end_epoch({"loss": 2.0}, num_batches=5, eval_every=every, epochs=epochs) == epoch
        assert state.progress == Progress(epoch=epoch + 1, eval_due=state.progress.eval_due)
        due += [epoch + 1] if state.progress.eval_due else []
    assert due == scored and state.averages == {"loss": 2.0, "lr": 0.1}


@pytest.mark.parametrize(
    ("every", "updates", "seconds", "due"),
    [
        (None, 10, 1e6, False),
        (5, 10, 0, True),
        (5, 11, 1e6, False),
        (TWO_MINUTES, 5, 119, False),
        (TWO_MINUTES, 7, 120, True),
    ],
)
def test_checkpoints_inside_an_epoch_are_due(every, updates, seconds, due):
    assert is_checkpoint_due(every, updates, seconds) is due


def test_the_average_follows_its_formula():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(model, decay=0.5)
    expected = model[0].weight.item()
    for updates in range(1, 8):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        model[1].num_batches_tracked.fill_(updates)
        average.update(model, updates)
        kept = min(0.5, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * model[0].weight.item()
        assert average.model[0].weight.item() == pytest.approx(expected, rel=1e-6)
        assert int(average.model[1].num_batches_tracked) == updates
    assert not any(module.training for module in average.model.modules())


def test_the_average_follows_tensors_that_were_replaced():
    """Moving a model makes new buffers, loading with ``assign`` new parameters, a copy both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, plain = WeightAverage(model, decay=0.5), copy.deepcopy(model)

    def load(average):
        weights = {name: value + 1 for name, value in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        return average

    def move(average):
        for moved in (model, average.model, plain):
            moved.double()
        return average

    def restore(average):
        average.model.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()}, assign=True)
        return average

    for updates, change in enumerate((lambda average: average, load, move, restore, copy.deepcopy, load), start=1):
        average = change(average)
        model(torch.randn(4, 2, dtype=model[0].weight.dtype))  # running statistics and their counter
        average.update(model, updates)
        kept = min(0.5, (1 + updates) / (10 + updates))
        for name, value in plain.state_dict().items():
            current = model.state_dict()[name]
            value.copy_(torch.lerp(value, current, 1 - kept) if value.is_floating_point() else current)
            assert torch.equal(average.model.state_dict()[name], value), (updates, name)


def test_the_average_walks_through_the_models_once(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, decay=0.5)
    average.update(model, 1)
    before = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *args, **kwargs: pytest.fail("a walk"))
    average.update(model, 2)
    assert not torch.equal(average.model[0].weight, before)


class LossModel(nn.Module):
    """A loss that depends on the images, on a norm that must not learn, and on sampling that must be seeded."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images, targets=None):
        assert self.training and not self.norm.training
        features = self.norm(torch.stack(images))
        return {"a": features.square().mean(), "b": torch.rand(()) * 0.1}


def _loss_on_ranks(rank, world_size):
    loader = ToyLoader(EvalBatchSampler(7, batch_size=2, rank=rank, world_size=world_size))
    return validation_loss(LossModel(), loader)


@pytest.mark.slow
def test_the_validation_loss_is_the_same_on_any_number_of_processes():
    alone = _loss_on_ranks(0, 1)
    assert alone["loss"] == alone["a"] + alone["b"] and 0 < alone["b"] < 0.1
    for world_size in (2, 3):
        assert run_on_ranks(world_size, _loss_on_ranks) == [alone] * world_size


def test_the_validation_loss_changes_nothing():
    model = LossModel().eval()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    validation_loss(model, ToyLoader(EvalBatchSampler(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not model.training and not model.norm.training


@pytest.mark.parametrize("step", [use_batched_step, lambda model: None], ids=["batched", "torchvision's"])
def test_the_validation_loss_of_a_detector_is_its_training_loss_at_the_size_of_evaluation(step):
    """A model that skips its resize in training, and draws a size, does neither here."""
    spec = ModelSpec("retinanet_resnet50_fpn", 3, min_size=(64, 96), max_size=128, skip_resize=True)
    torch.manual_seed(0)
    model = build_model(spec)
    step(model)
    loader = [([torch.rand(3, 40, 50)], [{"image_id": 1, "boxes": torch.tensor([[4.0, 6.0, 30.0, 36.0]])}])]
    loader[0][1][0]["labels"] = torch.ones(1, dtype=torch.int64)
    shapes = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    losses = validation_loss(model, loader)
    assert shapes == [(1, 3, 96, 128)]
    assert losses["loss"] == pytest.approx(losses["classification"] + losses["bbox_regression"])


def test_metrics_of_an_epoch_that_is_done_again_are_replaced(tmp_path):
    for epoch, value in [(0, 1.0), (1, 2.0), (2, 3.0), (1, 4.0)]:
        append_metrics(tmp_path, epoch, {"loss": value}, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "tra')  # a kill while an older version wrote
    append_metrics(tmp_path, 2, {"loss": 5.0}, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["train"]["loss"]) for line in lines] == [(0, 1.0), (1, 4.0), (2, 5.0)]


FAST = ("--model", "ssdlite320_mobilenet_v3_large", "--workers", "0", "--device", "cpu", "--batch-size", "3")


@pytest.mark.slow
def test_a_run_with_everything_and_its_repetition(drawn_coco, tmp_path, capsys, monkeypatch):
    """EMA, validation loss, best, early stop; --test-only scores the averaged weights to the same digits."""
    out = tmp_path / "out"
    common = (*FAST, "--dataset", "coco", "--data-path", drawn_coco)
    flags = (*common, "--epochs", "4", "--lr", "0", "--ema", "0.9", "--val-loss", "--early-stop", "1", "--profile", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])  # as a user starts it
    assert run(*flags, "--output-dir", out) == 0
    said = capsys.readouterr().out
    assert "no better evaluation in the last 1: stopping early" in said
    assert f"best epoch: 0; python predict.py --checkpoint {out / 'weights' / 'best.pth'} PICTURES" in said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0]["val_loss"]["loss"] > 0
    args = json.loads((out / "args.json").read_text())
    assert (
        args["args"]["ema"] == 0.9
        and "train.py --model ssdlite320_mobilenet_v3_large" in args["command"]
        and args["versions"]["torch"]
    )
    assert list(out.glob("events.out.tfevents.*"))

    best = load_checkpoint(out / "weights" / "best.pth")
    assert best["best"]["epoch"] == 0 and best["metrics"]["bbox"] == lines[0]["bbox"]
    averaged, _ = rebuild_model(best)
    raw, _ = rebuild_model(best, averaged=False)
    assert all(torch.equal(v, best["model_ema"][k]) for k, v in averaged.state_dict().items())
    assert all(torch.equal(v, best["model"][k]) for k, v in raw.state_dict().items())
    again = tmp_path / "again"
    assert run(*common, "--test-only", "--resume", out / "weights" / "best.pth", "--output-dir", again) == 0
    assert json.loads((again / "metrics.jsonl").read_text())["bbox"] == lines[0]["bbox"]

    # Epoch 7 of a continuation that was given up is the best in the folder: going on from here, the best is another.
    save_checkpoint({**best, "progress": {**best["progress"], "epoch": 8}}, out / "weights" / "best.pth")
    flags = (*common, "--ema", "0.9", "--epochs", "3", "--resume", "auto", "--output-dir", out)
    assert run(*flags) == 0
    assert "holds epoch 7 as the best, the checkpoint knows epoch 0" in capsys.readouterr().out
    assert load_checkpoint(out / "weights" / "best.pth")["best"]["epoch"] == 2
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert "in 3 epochs; all are done, a larger --epochs goes on" in said and "RANDOM" not in said
    assert json.loads((out / "best" / "summary.json").read_text())["epoch"] == 2


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_writes_nothing(drawn_coco, tmp_path, capsys):
    out = tmp_path / "out"
    flags = (*FAST, "--dataset", "coco", "--data-path", drawn_coco, "--epochs", "20", "--scale-lr", "--lr", "0.16")
    assert run(*flags, "--dry-run", "--output-dir", out) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert "trains on 6 of 6 images, is scored on 6" in said
    assert "3 images per update (3 per process x 1 process(es) x 1 step(s))" in said
    assert "2 updates per epoch, 40 in 20 epochs" in said
    assert "0.03 after 1 warm-up updates, times 0.1 at epoch(s) 16 of 20" in said
    assert "MB at the peak" in said
    assert (
        "from RANDOM weights, for very many pictures: --weights SSDLite320_MobileNet_V3_Large_Weights.COCO_V1" in said
    )
    update, hours, minutes, seconds = re.search(
        r"([\d.]+) s per update, .* about (\d+):(\d+):(\d+) for all", said
    ).groups()
    whole = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    assert whole == pytest.approx(40 * float(update), abs=1 + 40 * 0.005)


def test_the_largest_batch_is_the_one_with_the_largest_padded_pictures():
    heights, widths = np.array([10, 10, 10, 90, 50, 50]), np.array([10, 10, 90, 10, 50, 50])
    batches = np.array([[0, 1], [2, 3], [4, 5]])
    assert run_plan.largest_batch(batches, heights, widths, ModelSpec("fcos_resnet50_fpn", 2)).tolist() == [2, 3]


def test_the_largest_batch_is_largest_after_the_models_resize():
    """640 x 640 has 1.8 times the pixels of 640 x 360, and becomes 800 x 800 where the other becomes 768 x 1344."""
    heights, widths, batches = np.array([640, 360, 1280, 720]), np.array([640, 640, 1280, 1280]), np.arange(4)[:, None]
    of_model = {
        spec: run_plan.largest_batch(batches, heights, widths, spec).tolist()
        for spec in (ModelSpec("fcos_resnet50_fpn", 2), ModelSpec("fcos_resnet50_fpn", 2, min_size=(1333, 64)), ModelSpec("ssd300_vgg16", 2))
    }  # fmt: skip
    assert list(of_model.values()) == [[3], [2], [2]]


def test_a_rehearsal_resizes_to_the_longest_of_the_short_sides():
    model = nn.Module()
    model.transform = GeneralizedRCNNTransform((64, 96, 32), 200, [0.0] * 3, [1.0] * 3)

    def sides():
        return {model.transform([torch.zeros(3, 50, 60)])[0].image_sizes[0][0] for _ in range(20)}

    with run_plan.longest_short_side(model):
        assert sides() == {96}
    assert sides() == {64, 96, 32}


def test_memory_that_fragments_take_from_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 9 << 20)
    expected = "7 MB at the peak (9 MB taken from the GPU for it)"
    assert format_peak_memory(torch.device("cuda", 0)) == expected
    assert "taken from" not in format_peak_memory(torch.device("cpu"))


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (LearningRate(0.02, 26, "multisteplr", (16, 22), 0.1, 9), "0.02 after 9 warm-up updates, times 0.1 at epoch(s) 16 22"),
        (LearningRate(0.02, 4, "multisteplr", (16, 22), 0.1, 0), "constant over 4 epochs"),
        (LearningRate(0.15, 660, "cosineannealinglr", (), 0.1, 5), "down to 0 along a cosine over 660 epochs"),
    ],
)  # fmt: skip
def test_the_rate_is_told_in_words(schedule, text):
    assert text in run_plan.format_rate(schedule)


def test_a_full_disk_is_found_before_the_first_step(drawn_coco, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_plan.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1 << 20))
    flags = [*FAST, "--dataset", "coco", "--data-path", str(drawn_coco), "--output-dir", str(tmp_path / "a" / "b")]
    assert train.run_as_command(flags) == 1
    out = capsys.readouterr()
    assert "NOT ENOUGH" in out.out and "two checkpoints need" in out.err and "1 MB are free" in out.err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema", "1.5"], "--ema 1.5: expected a decay between 0 and 1"),
        (["--best-metric", "segm/AP", "--model", "ssd300_vgg16"], "expected one of bbox/AP"),
        (["--checkpoint-every", "0"], "expected updates, such as 500, or minutes, such as 15m"),
        (["--checkpoint-every", "5h"], "expected updates, such as 500, or minutes, such as 15m"),
        (["--early-stop", "-1"], "--early-stop -1: must not be negative"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.run_as_command(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err
