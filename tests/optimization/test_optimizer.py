"""Optimizers, groups and rates equal those of torchvision's scripts, built from torch's own schedulers."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from optimization.optimizer import build_optimizer, parameter_groups, restore_optimizer
from optimization.schedule import LearningRate, default_warmup


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Linear(4, 4))


def reference_rates(scheduler, epochs, batches, lr=0.02):
    """The reference's two recursive schedulers, stepped as its loop steps them."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
    if scheduler == "multisteplr":
        by_epoch = MultiStepLR(optimizer, [2, 3], gamma=0.1)
    else:
        by_epoch = CosineAnnealingLR(optimizer, epochs)
    rates = []
    for epoch in range(epochs):
        warmup = LinearLR(optimizer, 1 / 1000, total_iters=min(1000, batches - 1)) if epoch == 0 else None
        for _ in range(batches):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if warmup is not None:
                warmup.step()
        by_epoch.step()
    return rates


@pytest.mark.parametrize("scheduler", ["multisteplr", "cosineannealinglr"])
@pytest.mark.parametrize("batches", [2, 5, 1200])
def test_rates_equal_the_references(scheduler, batches):
    epochs = 5 if batches < 100 else 2
    warmup = default_warmup(batches)
    ours = LearningRate(0.02, epochs, scheduler, (2, 3), 0.1, warmup)
    rates = [ours.at(step // batches, step) for step in range(epochs * batches)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference_rates(scheduler, epochs, batches)
    assert rates == pytest.approx(expected, rel=1e-9)


def test_a_one_batch_epoch_does_not_freeze_the_rate():
    rates = LearningRate(0.02, 30, "multisteplr", (16, 22), 0.1, default_warmup(1))
    assert [rates.at(epoch, epoch) for epoch in (0, 1, 16, 22)] == pytest.approx([0.02, 0.02, 0.002, 0.0002])


def test_a_long_warmup_goes_on_after_the_first_epoch():
    rates = LearningRate(1.0, 10, "multisteplr", (), 0.1, warmup_iters=8)
    assert rates.at(1, 4) == pytest.approx(0.001 + 0.999 * 0.5)
    assert rates.at(2, 8) == 1.0


def test_a_rate_of_which_nothing_is_said_is_constant_and_falls_at_milestones_as_torchs():
    assert {LearningRate(0.02, 3).at(epoch, updates) for epoch in range(3) for updates in range(3)} == {0.02}
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.02)
    scheduler = MultiStepLR(optimizer, [1])
    optimizer.step()
    scheduler.step()
    assert LearningRate(0.02, 3, milestones=[1]).at(1, 9) == pytest.approx(scheduler.get_last_lr()[0])


def test_norm_layers_get_their_own_weight_decay():
    model = net()
    model[0].bias.requires_grad_(False)
    norms, others = parameter_groups(model, 0.0)
    assert {id(p) for p in norms["params"]} == {id(p) for layer in (model[1], model[2]) for p in layer.parameters()}
    assert norms["weight_decay"] == 0.0
    assert [p.shape for p in others["params"]] == [(4, 3, 3, 3), (4, 4), (4,)]
    assert len(parameter_groups(model, None)) == 1
    assert len(parameter_groups(nn.Linear(2, 2), 0.0)) == 1  # empty groups are dropped


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
        ("sgd_nesterov", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
    ],
)
def test_optimizers_step_like_torchs_own(name, plain):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    a, b = build_optimizer(ours, name, lr=0.1, momentum=0.9, weight_decay=0.01), plain(theirs.parameters())
    for _ in range(4):
        x = torch.randn(8, 4)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_unknown_names_and_frozen_models_are_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'lamb'.*sgd, sgd_nesterov, adamw"):
        build_optimizer(net(), "lamb", lr=0.1, momentum=0, weight_decay=0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(net().requires_grad_(False), "sgd", lr=0.1, momentum=0, weight_decay=0)
    with pytest.raises(ValueError, match="unknown scheduler 'poly'"):
        LearningRate(1.0, 1, "poly").at(0, 0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_restored_momenta_fit_weights_of_another_memory_format(name):
    """A run continued with --channels-last goes on as one without; hyperparameters are those of the new run."""

    def step(model, optimizer):
        model(torch.ones(1, 4, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3)
    first = build_optimizer(plain, name, lr=0.01, momentum=0.9, weight_decay=0.0)
    for _ in range(3):
        step(plain, first)
    continued = nn.Conv2d(4, 6, 3)
    continued.load_state_dict(plain.state_dict())
    continued.to(memory_format=torch.channels_last)
    second = build_optimizer(continued, name, lr=0.01, momentum=0.9, weight_decay=0.25)
    restore_optimizer(second, copy.deepcopy(first.state_dict()))  # loading shares the counter of steps
    assert second.param_groups[0]["weight_decay"] == 0.25
    second.param_groups[0]["weight_decay"] = 0.0
    for _ in range(3):
        step(plain, first)
        step(continued, second)
    assert torch.allclose(plain.weight, continued.weight, atol=1e-6)
