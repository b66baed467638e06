"""The training step: no update on a bad loss, no wait of its own, sums over steps and processes."""

import itertools
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import engine
from benchmarks.waits import Count, count_waits
from engine import evaluate, train_one_epoch, validation_loss
from group_by_aspect_ratio import EvalBatchSampler, GroupedBatchSampler
from helpers.ranks import run_on_ranks
from helpers.toy import ToyLoader, ToyModel
from optimization.optimizer import build_optimizer
from optimization.schedule import LearningRate
from optimization.step import StepOptions, update_parameters
from runtime import step_guard
from runtime.progress import Progress
from runtime.signals import StopRequest
from runtime.step_guard import NonFiniteLossError, StepGuard, report_bad_step
from runtime.trackers import StepRecord, Tracker
from training.state import EndOfUpdate
from utils import seed_torch


def sampler(num_images=12, **options):
    options = {"group_factor": -1, "batch_size": 2, "seed": 0, **options}
    return GroupedBatchSampler(np.full(num_images, 4), np.full(num_images, 4), **options)


def train(model, *, stop=None, loader=None, progress=None, trackers=(), **options):
    optimizer = build_optimizer(model, "sgd", lr=0.05, momentum=0.9, weight_decay=0.0)
    progress = Progress() if progress is None else progress
    averages = train_one_epoch(
        nn.parallel.DistributedDataParallel(model) if torch.distributed.is_initialized() else model,
        optimizer,
        ToyLoader(sampler()) if loader is None else loader,
        progress=progress,
        learning_rate=LearningRate(0.05, 1),
        options=StepOptions(**{"print_freq": 3, **options}),
        stop=StopRequest() if stop is None else stop,
        trackers=trackers,
    )
    return averages, progress


def fresh(**options):
    torch.manual_seed(0)
    return ToyModel(**options)


def test_an_epoch_equals_a_bare_loop():
    model, plain = fresh(), fresh()
    averages, progress = train(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for images, targets in ToyLoader(sampler()):
        loss = sum(plain(images, targets).values())
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(model.layer.weight, plain.layer.weight, atol=1e-6)
    assert averages["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert averages["loss"] == pytest.approx(averages["loss_a"] + averages["loss_b"])
    assert (progress.updates, progress.batches) == (6, 6)


def test_accumulated_steps_equal_larger_batches():
    """Two batches of two, added, move the weights like their average over four images."""
    model, plain = fresh(), fresh()
    _, progress = train(model, accumulate=2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    batches = list(ToyLoader(sampler()))
    for first, second in zip(batches[0::2], batches[1::2]):
        loss = sum(sum(plain(*batch).values()) for batch in (first, second)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(model.layer.weight, plain.layer.weight, atol=1e-6)
    assert progress.updates == 3


def test_a_bad_loss_stops_with_its_name_step_rate_and_images(tmp_path):
    model = fresh(bad_ids=[5])
    with pytest.raises(
        NonFiniteLossError, match=r"epoch 0 step \d+.*loss_a = nan.*rate 0\.05.*image ids \[.*5.*\]"
    ) as error:
        train(model, debug_folder=tmp_path)
    assert "loss_b" not in str(error.value)
    (saved,) = tmp_path.glob("bad_batch_*.pt")
    assert 5 in [t["image_id"] for t in torch.load(saved, weights_only=True)["targets"]]
    assert torch.isfinite(model.layer.weight).all()


def test_a_bad_batch_of_a_gpu_is_saved_as_tensors_of_the_cpu(tmp_path, monkeypatch):
    """Fake tensors say they are on a GPU and need none."""
    saved = []
    monkeypatch.setattr(step_guard, "write_torch_file", lambda content, file: saved.append(content))
    with FakeTensorMode():
        image = torch.empty(3, 4, 4, device="cuda")
        target = {"image_id": 7, "boxes": torch.empty(2, 4, device="cuda")}
    record = StepRecord(0, 0, 0, True, 0.1, ["loss"], torch.tensor([float("nan")]), [image], [target])
    assert image.device.type == "cuda"
    report_bad_step(record, True, False, StepOptions(on_nan="skip", debug_folder=tmp_path))
    (content,) = saved
    tensors = [content["images"][0], content["targets"][0]["boxes"]]
    assert [tensor.device.type for tensor in tensors] == ["cpu", "cpu"] and content["targets"][0]["image_id"] == 7


def test_skip_leaves_out_the_update_and_nothing_else():
    """Equal to a bare loop that passes over the bad batch, optimizer momentum included."""
    model, plain = fresh(bad_ids=[5]), fresh()
    train(model, on_nan="skip")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for images, targets in ToyLoader(sampler()):
        if 5 in [t["image_id"] for t in targets]:
            continue
        optimizer.zero_grad()
        sum(plain(images, targets).values()).backward()
        optimizer.step()
    assert torch.allclose(model.layer.weight, plain.layer.weight, atol=1e-6)


@pytest.mark.parametrize("bad_ids", [[5], range(100)])
def test_a_loss_that_is_not_finite_is_left_out_of_the_epoch_s_mean_and_counted(caplog, bad_ids):
    caplog.set_level("INFO")
    losses = []

    class Watch(Tracker):
        def on_step(self, record):
            losses.append(float(record.losses.sum()))

    averages, _ = train(fresh(bad_ids=bad_ids), on_nan="skip", trackers=[Watch()])
    kept = [loss for loss in losses if np.isfinite(loss)]
    assert averages.get("loss") == (pytest.approx(np.mean(kept), rel=1e-6) if kept else None)
    assert averages["bad_batches"] == 6 - len(kept) > 0 and np.isfinite(list(averages.values())).all()
    assert f"bad batches: {6 - len(kept)}" in caplog.text
    assert "bad_batches" not in train(fresh())[0]


def test_a_step_keeps_its_number_where_a_run_goes_on_inside_the_epoch(caplog):
    """So that a bad batch's name and file tell which it was, and do not replace one of before."""
    caplog.set_level("INFO")
    seen = {}

    class Watch(Tracker):
        def on_step(self, record):
            batches.setdefault(record.step, [target["image_id"] for target in record.targets])

    for first in (0, 4):
        batches, order = seen.setdefault(first, {}), sampler()
        order.set_epoch(0, first)
        train(fresh(), loader=ToyLoader(order), progress=Progress(batches=first, updates=first), trackers=[Watch()])
    assert list(seen[0]) == [0, 1, 2, 3, 4, 5] and seen[4] == {step: seen[0][step] for step in (4, 5)}
    places = [line.partition("  ")[0] for line in caplog.messages if line.startswith("Epoch")]
    assert places == [f"Epoch: [0] [{step}/6]" for step in (1, 3, 6, 5, 6)]


class NormedModel(ToyModel):
    """Its bad images are not numbers from the first layer on, as a broken picture is."""

    def __init__(self, bad_ids=()):
        super().__init__(bad_ids)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images, targets=None):
        is_bad = bool(self.bad_ids & {target["image_id"] for target in targets})
        images = self.norm(torch.stack(list(images)) * (float("nan") if is_bad else 1))
        return super().forward(images, targets)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_update_leaves_the_statistics_of_norms_as_they_were(accumulate):
    torch.manual_seed(0)
    model, seen = NormedModel(bad_ids={5}), []

    class Watch(Tracker):
        def on_update(self, record, may_save):
            seen.append(model.norm.running_mean.clone())

    train(model, on_nan="skip", accumulate=accumulate, trackers=[Watch()])
    assert all(torch.isfinite(mean).all() for mean in seen) and torch.isfinite(model.norm.running_var).all()
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise([torch.zeros(3), *seen])]
    assert changed.count(False) == 1  # the update with image 5


def test_endless_skipping_is_given_up():
    with pytest.raises(NonFiniteLossError):
        train(fresh(bad_ids=range(100)), on_nan="skip", loader=ToyLoader(sampler(60)))


def test_skipped_updates_are_counted_over_epochs_and_not_by_their_steps():
    model, progress = fresh(bad_ids=range(100)), Progress()
    for epoch in range(3):  # six updates each
        train(model, on_nan="skip", progress=progress)
        progress.batches = 0
        assert progress.skipped == 6 * (epoch + 1)
    with pytest.raises(NonFiniteLossError):
        train(model, on_nan="skip", progress=progress)
    train(fresh(bad_ids=range(100)), on_nan="skip", loader=ToyLoader(sampler(60)), accumulate=2)  # 15 updates


class LateEvent:
    """Stands for a GPU's event, which flags wait for."""

    def record(self):
        self.seen = False

    def synchronize(self):
        self.seen = True


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_checkpoint_due_at_a_bad_step_does_not_count_its_batch_though_a_gpu_tells_a_step_late(monkeypatch, on_nan):
    saved, progress, model = [], Progress(), fresh(bad_ids=[5])
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(engine, "StepGuard", lambda device, *rest: StepGuard(torch.device("cuda"), *rest))
    state, output = SimpleNamespace(average=None), SimpleNamespace(saved_at=0.0, save=saved.append)
    state.content = lambda: {**vars(progress), "weight": model.layer.weight.detach().clone()}
    bad = next(n for n, batch in enumerate(sampler()) if 5 in [index for _, index in batch])
    assert 0 < bad < 5
    try:
        train(model, progress=progress, trackers=[EndOfUpdate(state, output, 1)], on_nan=on_nan)
        assert on_nan == "skip" and [content["batches"] for content in saved] == [1, 2, 3, 4, 5, 6]
        assert [content["skipped"] for content in saved] == [int(n == bad) for n in range(6)]
    except NonFiniteLossError:
        assert on_nan == "stop" and [content["batches"] for content in saved] == list(range(1, bad + 1))


def test_ranks_act_on_a_gpu_s_flags_in_the_same_step_where_one_has_read_them_to_save(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    stop, stopping = StopRequest(), {}
    stop.signal_name = "SIGTERM"
    record = StepRecord(0, 0, 1, True, 0.1, ["loss"], torch.zeros(1), [], [])
    for saves in (False, True):
        guard = StepGuard(torch.device("cuda"), stop, Progress(), StepOptions())
        stopping[saves] = []
        for _ in range(2):
            guard.reduce_flags(torch.zeros(1))
            guard.enqueue(record, torch.zeros(()))
            guard.handle_arrived()
            assert not saves or guard.may_save()
            stopping[saves].append(guard.stopping)
    assert stopping[True] == stopping[False] == [False, True]


class BadGradient(ToyModel):
    """Its losses are finite, the gradient on image 5 is not."""

    def forward(self, images, targets=None):
        losses = super().forward(images, targets)
        if 5 in [t["image_id"] for t in targets]:
            losses["loss_b"] = losses["loss_b"] + (0 * self.layer.weight).sum().sqrt()
        return losses


@pytest.mark.parametrize("clip_grad_norm", [None, 10.0])
def test_a_gradient_that_is_not_finite_changes_no_weight(caplog, clip_grad_norm):
    torch.manual_seed(0)
    model = BadGradient()
    with pytest.raises(NonFiniteLossError, match=r"gradient not finite, .*image ids \[.*5.*\]"):
        train(model, clip_grad_norm=clip_grad_norm)
    assert torch.isfinite(model.layer.weight).all()
    torch.manual_seed(0)
    model, plain = BadGradient(), fresh(bad_ids=[5])
    train(model, on_nan="skip", clip_grad_norm=clip_grad_norm)
    train(plain, on_nan="skip", clip_grad_norm=clip_grad_norm)
    assert torch.equal(model.layer.weight, plain.layer.weight)
    assert sum("gradient not finite" in message for message in caplog.messages) == 1


def test_with_a_scaler_a_bad_loss_of_finite_gradients_changes_nothing_either():
    model, scaler = nn.Linear(3, 3), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = build_optimizer(model, "sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
    for bad in (1.0, 0.0):
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        assert float(update_parameters(optimizer, StepOptions(scaler=scaler), torch.tensor(bad))) == bad
        assert torch.equal(model.weight, before) == bool(bad)
        assert torch.isfinite(model.weight).all() and scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_update_with_the_flag_set_changes_nothing(name):
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(model, name, lr=0.1, momentum=0.9, weight_decay=0.1)
    for flag in (0.0, 1.0, 1.0):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = repr(optimizer.state_dict())
        model(torch.randn(2, 3)).sum().backward()
        update_parameters(optimizer, StepOptions(), torch.tensor(flag))
        changed = any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert changed == (flag == 0.0)
        if flag:
            assert repr(optimizer.state_dict()) == state
        assert model.weight.grad is None


def test_the_first_update_can_be_left_out():
    """The momentum is that of a run that begins with the second update, not what was in memory before."""
    gradients = [torch.full((3, 3), float("nan")), torch.ones(3, 3), torch.full((3, 3), 2.0)]
    left_out, plain = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    plain.load_state_dict(left_out.state_dict())
    torch.full((1000, 3, 3), 1e30)  # rubbish for the allocator to hand out
    optimizer = build_optimizer(left_out, "sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step, gradient in enumerate(gradients):
        left_out.weight.grad = gradient.clone()
        update_parameters(optimizer, StepOptions(), torch.tensor(float(step == 0)))
        if step:
            plain.weight.grad = gradient.clone()
            reference.step()
    assert torch.equal(left_out.weight, plain.weight)


def test_clipping_limits_the_gradient_and_a_bad_norm_skips():
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, "sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    before = model.weight.detach().clone()
    (model(torch.tensor([[300.0, 400.0]])).sum() * 10).backward()
    update_parameters(optimizer, StepOptions(clip_grad_norm=0.5), torch.tensor(0.0))
    assert float((model.weight - before).norm()) == pytest.approx(0.5, rel=1e-4)
    before = model.weight.detach().clone()
    (model(torch.tensor([[1.0, 1.0]])).sum() * float("inf")).backward()
    update_parameters(optimizer, StepOptions(clip_grad_norm=0.5), torch.tensor(0.0))
    assert torch.equal(model.weight, before)


def test_float16_overflow_belongs_to_the_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    model = fresh()
    train(model, scaler=scaler)
    assert scaler.get_scale() < 2.0**127
    assert torch.isfinite(model.layer.weight).all()


def test_bfloat16_autocast_trains_on_the_cpu():
    averages, _ = train(fresh(), amp_dtype=torch.bfloat16)
    assert np.isfinite(averages["loss"])


def test_a_stop_ends_after_the_current_update():
    stop = StopRequest()
    tracker = Tracker()
    tracker.on_update = lambda record, may_save: (
        setattr(stop, "signal_name", "SIGTERM") if record.updates == 2 else None
    )
    _, progress = train(fresh(), stop=stop, trackers=[tracker])
    assert progress.updates == 3 and progress.batches == 3


def test_a_step_does_not_depend_on_the_steps_before(monkeypatch):
    """The generators are seeded per step: dropout-like noise is the same after a resume."""

    class Noisy(ToyModel):
        def forward(self, images, targets=None):
            draws.append(float(torch.rand(())))
            return super().forward(images, targets)

    runs = []
    for first_batch in (0, 2):
        draws = []
        torch.manual_seed(first_batch)
        order = sampler()
        order.set_epoch(0, first_batch)
        train(Noisy(), loader=ToyLoader(order))
        runs.append(draws)
    assert runs[0][2:] == runs[1]


def _train_rank(rank, world_size, mode):
    torch.manual_seed(0)
    stop = StopRequest()
    order = sampler(13, batch_size=2, rank=rank, world_size=world_size)
    model = ToyModel(bad_ids=[3] if mode == "nan" else [])
    progress = Progress()
    if mode == "stop" and rank == 1:
        stop.signal_name = "SIGTERM"
    try:
        train(model, loader=ToyLoader(order), stop=stop, progress=progress)
    except NonFiniteLossError as error:
        return str(error), model.layer.weight.tolist(), vars(progress)
    return None, model.layer.weight.tolist(), vars(progress)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch():
    ranks = run_on_ranks(2, _train_rank, "plain")
    assert ranks[0][1] == ranks[1][1]
    plain = fresh()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    batches = sampler(13, batch_size=2).epoch_batches(0)
    loader = ToyLoader(sampler(13, batch_size=2))
    by_batch = list(loader)
    assert len(batches) == 6
    for first, second in zip(by_batch[0::2], by_batch[1::2]):
        loss = sum(sum(plain(*batch).values()) for batch in (first, second)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(plain.layer.weight, torch.tensor(ranks[0][1]), atol=1e-5)


@pytest.mark.slow
def test_all_ranks_stop_together_on_a_bad_loss_of_one():
    ranks = run_on_ranks(2, _train_rank, "nan")
    assert ranks[0][1] == ranks[1][1] and ranks[0][2] == ranks[1][2]
    errors = [error for error, _, _ in ranks]
    assert all(errors) and sum("loss_a = nan" in error for error in errors) == 1
    assert sum("on another process" in error for error in errors) == 1


@pytest.mark.slow
def test_all_ranks_stop_together_when_one_is_asked():
    ranks = run_on_ranks(2, _train_rank, "stop")
    assert ranks[0][1:] == ranks[1][1:]
    assert ranks[0][2]["updates"] == 1


class ToyEvaluator:
    max_keypoint_dets = 0

    def __init__(self):
        self.ids = []

    def reset(self):
        self.ids = []

    def update(self, image_ids, outputs, label_map):
        self.ids += image_ids
        return []

    def compute(self):
        return self.ids


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_mode_and_generators(training):
    class Model(nn.Module):
        def forward(self, images):
            assert not self.training
            torch.rand(3)
            return [{} for _ in images]

    model = Model().train(training)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ids = evaluate(model, ToyLoader(EvalBatchSampler(5, batch_size=2)), ToyEvaluator(), None)
    assert ids == [0, 1, 2, 3, 4]
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)


class FakeGenerator:
    """Stands for a GPU's."""

    def __init__(self, patch):
        self.state = 3
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "get_rng_state", lambda: self.state)
        patch.setattr(torch.cuda, "set_rng_state", lambda state: setattr(self, "state", state))
        patch.setattr(torch.cuda, "manual_seed", lambda seed: setattr(self, "state", seed))


def test_evaluation_restores_a_gpu_s_generator_too(monkeypatch):
    generator = FakeGenerator(monkeypatch)
    seen = []

    class Model(nn.Module):
        def forward(self, images, targets=None):
            seed_torch("draws", len(seen))
            seen.append(generator.state)
            return {"loss": torch.zeros(())} if targets is not None else [{} for _ in images]

    evaluate(Model(), ToyLoader(EvalBatchSampler(1)), ToyEvaluator(), None)
    validation_loss(Model(), ToyLoader(EvalBatchSampler(1)))
    assert len(seen) == 2 and 3 not in seen and generator.state == 3


def test_a_batch_is_scored_while_the_model_works_on_the_next_and_never_more_than_one():
    begun = [threading.Event() for _ in range(5)]
    ended = []

    class Model(nn.Module):
        def forward(self, images):
            step = sum(event.is_set() for event in begun)
            assert ended == list(range(len(ended))) and len(ended) >= step - 1
            begun[step].set()
            return [{} for _ in images]

    class Evaluator(ToyEvaluator):
        def update(self, image_ids, outputs, label_map):
            (step,) = image_ids
            assert step + 1 == len(begun) or begun[step + 1].wait(20)
            ended.append(step)
            return super().update(image_ids, outputs, label_map)

    written = []
    ids = evaluate(
        Model(),
        ToyLoader(EvalBatchSampler(5)),
        Evaluator(),
        None,
        on_batch=lambda image_ids, _: written.extend(image_ids),
    )
    assert ids == written == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [0, 1, 4])
@pytest.mark.parametrize("where", ["update", "on_batch"])
def test_what_fails_in_scoring_fails_the_evaluation(where, bad):
    seen = []

    class Model(nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return [{} for _ in images]

    class Evaluator(ToyEvaluator):
        def update(self, image_ids, outputs, label_map):
            if where == "update" and bad in image_ids:
                raise ValueError(f"image {image_ids}")
            return super().update(image_ids, outputs, label_map)

    def on_batch(image_ids, detections):
        if where == "on_batch" and bad in image_ids:
            raise ValueError(f"image {image_ids}")

    with pytest.raises(ValueError, match=rf"image \[{bad}\]"):
        evaluate(Model(), ToyLoader(EvalBatchSampler(5)), Evaluator(), None, on_batch=on_batch)
    assert len(seen) == min(bad + 2, 5)


def test_an_evaluation_that_fails_restores_the_mode_too():
    class Broken(nn.Module):
        def forward(self, images):
            raise ArithmeticError

    model = Broken().train()
    with pytest.raises(ArithmeticError):
        evaluate(model, ToyLoader(EvalBatchSampler(2)), ToyEvaluator(), None)
    assert model.training


def test_an_evaluation_ends_when_asked_to_stop():
    class Model(nn.Module):
        def forward(self, images):
            return [{} for _ in images]

    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    assert evaluate(Model(), ToyLoader(EvalBatchSampler(50)), ToyEvaluator(), None, stop=stop) is None


def bare_loop(model, loader):
    optimizer = build_optimizer(model, "sgd", lr=0.05, momentum=0.9, weight_decay=0.0)
    for images, targets in loader:
        sum(model(images, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def engine_loop(model, loader):
    train(model, loader=loader, print_freq=10**9)


def waits_per_step(loop):
    """What 10 more steps bring."""
    counts = []
    for steps in (2, 12):
        loader = ToyLoader(sampler(num_images=2 * steps))
        counts.append(count_waits(lambda data=loader: loop(fresh(), data)))
    return counts[1] - counts[0]


def test_the_engine_waits_for_the_device_no_more_often_than_a_bare_loop():
    """The one read is that of the flags, which a GPU has sent to the host a step before; the toys copy their ids and images."""
    bare = waits_per_step(bare_loop)
    assert bare == {"tensor": 10, "to": 20}
    assert waits_per_step(engine_loop) == {**bare, "tolist": 10}


def set_by_mask(value):
    value[value > 0] = 0.0


def test_the_counter_of_waits_finds_them():
    value = torch.ones(4)
    waits = [
        lambda: value.sum().item(), lambda: bool(value.any()), lambda: float(value[0]), lambda: value.tolist(),
        lambda: value.numpy(), lambda: value.cpu(), lambda: value.to("cpu"), lambda: value[value > 0], lambda: value.nonzero(),
        lambda: torch.tensor([1.0], device=value.device), lambda: torch.as_tensor([1.0], device=value.device),
        lambda: torch.tensor([1.0]).to(value.device), lambda: value.new_tensor([1.0]), lambda: value[[0, 1]],
        lambda: value.copy_(torch.zeros(4)), lambda: value[torch.tensor([0, 1])], lambda: set_by_mask(value.clone()),
        lambda: torch.from_numpy(np.ones(4)).to(device=value.device), lambda: torch.zeros(4).copy_(value),
    ]  # fmt: skip
    for n, wait in enumerate(waits):
        assert count_waits(wait).total() == 1, n
    calm = [
        lambda: (value * 2).to(torch.float64).sum(), lambda: torch.empty(1).uniform_().item(), lambda: torch.tensor([1, 2]).tolist(),
        lambda: torch.arange(3).nonzero(), lambda: value.new_zeros(3).sum(), lambda: torch.arange(3, device=value.device) * value[:3],
        lambda: torch.tensor([1.0]).to(value.device, non_blocking=True), lambda: value.to(value.device), lambda: value * torch.tensor(2.0),
    ]  # fmt: skip
    for n, step in enumerate(calm):
        assert count_waits(step).total() == 0, n


def test_the_counter_tells_operations_from_views_and_the_host_from_the_device():
    value = torch.ones(4)
    with Count() as count:
        (value.view(2, 2).T[0] * 2).add_(1)
    assert count.operations == {"all": 2}
    with Count() as count:
        count.part = "copy"
        torch.tensor([1.0]).to(value.device, non_blocking=True)
    assert count.copies == {"copy": 1} and count.operations == {"copy": 1}
    with Count() as count:
        value + torch.zeros(4)
    assert count.mixed == {"add": 1}


def test_the_toys_can_be_used_on_any_device():
    loader = ToyLoader(sampler())
    loader.device = torch.device("meta")
    losses = fresh().to("meta")(*next(iter(loader)))
    assert {loss.device.type for loss in losses.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_engine_adds_no_synchronisation():
    """Torch's own trap: one warning per synchronising call."""

    def syncs(loop):
        counts = []
        for steps in (2, 12):
            loader = ToyLoader(sampler(num_images=2 * steps))
            loader.device = torch.device("cuda")
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                loop(fresh().cuda(), loader)
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("called a synchronizing CUDA operation" in str(w.message) for w in found))
        return counts[1] - counts[0]

    assert syncs(engine_loop) == syncs(bare_loop)
