"""What a checkpoint's content gives back to a state, and which content is refused."""

import copy
import dataclasses
import logging
import re

import pytest
import torch
from torch import nn

from annotations.labels import LabelMap
from loading.splits import Data, load_shapes_split
from models.architectures import ModelSpec
from optimization.optimizer import build_optimizer
from optimization.weight_average import WeightAverage
from runtime.checkpoint import CheckpointError
from runtime.progress import Progress
from training.state import TrainingState, format_best

ORDER = {"groups": 3, "seed": 0, "repeat factors": None}


def new_state(*, scaled=False, averaged=False, opt="sgd", norm_weight_decay=None, **order):
    """A state before its first update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    split = load_shapes_split("val")
    return TrainingState(
        model,
        ModelSpec("fcos_resnet50_fpn", 2),
        build_optimizer(model, opt, lr=0.1, momentum=0.9, weight_decay=0.1, norm_weight_decay=norm_weight_decay),
        torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None,
        WeightAverage(model, 0.5) if averaged else None,
        Data(None, split, LabelMap.contiguous(split.annotations.categories)),
        {"opt": opt},
        {**ORDER, **order},
    )


def after_an_update(**options):
    state = new_state(**options)
    loss = state.model(torch.ones(1, 2)).square().sum() + state.model[0].weight.sum()
    loss.backward()
    state.optimizer.step()
    if state.scaler is not None:
        state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 4.0})
    if state.average is not None:
        state.average.update(state.model, 5)
    state.progress = Progress(2, 0, 40, eval_due=True)
    state.averages, state.metrics, state.best = {"loss": 0.5}, {"bbox": {"AP": 0.25}}, {"metric": "bbox/AP", "since": 1}
    return state


@pytest.mark.parametrize("now", [{}, {"scaled": True}, {"averaged": True}, {"scaled": True, "averaged": True}])
@pytest.mark.parametrize("before", [{}, {"scaled": True, "averaged": True}])
def test_a_state_takes_up_what_the_one_before_had_and_it_has_too(before, now):
    """A run goes on with or without --ema and --amp, whichever the run before had."""
    old, state = after_an_update(**before), new_state(**now)
    state.restore(copy.deepcopy(old.content()))
    momenta = [[entry["momentum_buffer"] for entry in s.optimizer.state.values()] for s in (old, state)]
    assert momenta[0] and all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    for name in ("progress", "averages", "metrics", "best"):
        assert getattr(state, name) == getattr(old, name)
    if state.scaler is not None:
        assert state.scaler.get_scale() == (4.0 if old.scaler else 16.0)
    if state.average is not None:
        expected = old.average.model.state_dict() if old.average else new_state().model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in state.average.model.state_dict().items())
    assert ("model_ema" in old.content()) == bool(before) and bool(old.content()["scaler"]) == bool(before)


@pytest.mark.parametrize("change", [{"groups": -1}, {"seed": 5}, {"repeat factors": "1234"}])
def test_other_batches_are_refused_inside_an_epoch_only(change):
    content = after_an_update().content()
    del content["order"]["repeat factors"]  # older checkpoints had none
    new_state(**change).restore(content)
    content["progress"]["batches"] = 7
    new_state().restore(content)
    ((name, now),) = change.items()
    message = rf"after batch 7 of epoch 2, .* other batches \({name} {ORDER[name]}, now {now}\)"
    with pytest.raises(CheckpointError, match=message):
        new_state(**change).restore(content)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"opt": "adamw"}, "--opt sgd, now adamw"),
        ({"opt": "adamw"}, {}, "--opt adamw, now sgd"),
        ({}, {"norm_weight_decay": 0.0}, r"1 group\(s\) of weight decay, now 2"),
        ({"norm_weight_decay": 0.0}, {}, r"2 group\(s\) of weight decay, now 1"),
        ({"opt": "adamw"}, {"norm_weight_decay": 0.0}, "--opt adamw, now sgd; 1 group"),
    ],
)
def test_momenta_of_another_optimizer_are_refused(before, now, message):
    with pytest.raises(CheckpointError, match=f"the checkpoint's optimizer is another one: {message}"):
        new_state(**now).restore(after_an_update(**before).content())


def test_settings_that_differ_are_named_and_equal_ones_are_not(caplog):
    caplog.set_level(logging.INFO)
    content = after_an_update().content()
    new_state().restore(copy.deepcopy(content))
    assert not caplog.records
    content["world_size"], content["args"] = 2, {**content["args"], "amp": True, "lr": 0.5, "workers": 3}
    state = new_state()
    state.flags |= {"amp": False, "lr": 0.25, "workers": 4}
    state.restore(content)
    course, numeric = (record.getMessage() for record in caplog.records)
    assert course == "from here on with other flags: --lr 0.5, now 0.25"
    assert re.search(r"\(processes 2, now 1; --amp True, now False\): no sample is lost", numeric)


def test_of_the_model_only_what_does_change_is_named(caplog):
    """A checkpoint's model keeps its sizes where flags give none, and its frozen layers and anchors in any case."""
    caplog.set_level(logging.INFO)
    content = after_an_update().content()
    had = {"trainable_backbone_layers": 2, "min_size": [400], "max_size": 600, "anchor_sizes": [16], "lr": 0.5}
    content["args"] |= had
    content["model_spec"] |= {"trainable_layers": 2, "min_size": (400,), "max_size": 600}
    state = new_state()
    state.spec = dataclasses.replace(ModelSpec.from_plain(content["model_spec"]), max_size=500)
    state.flags |= dict.fromkeys(had) | {"max_size": 500, "lr": 0.5}
    state.restore(copy.deepcopy(content))
    assert caplog.messages == ["from here on with other flags: --max-size 600, now 500"]
    caplog.clear()
    state.flags["trainable_backbone_layers"] = 3
    state.restore(content)
    assert caplog.messages[0] == "--trainable-backbone-layers has no effect: the checkpoint's model trains 2"


def test_a_run_is_stale_after_so_many_evaluations_without_a_better_one_and_never_with_0():
    state = new_state()
    assert [state.is_stale(n) for n in (0, 1)] == [False, False]
    state.best = {"since": 2}
    assert [state.is_stale(n) for n in (0, 1, 2, 3)] == [False, True, True, False]


def test_a_value_at_the_end_of_the_interval_is_within_it():
    """As where every image is perfect, twice."""
    evaluation = {"metric": "bbox/AP", "value": 1.0, "epoch": 3, "interval": [1.0, 1.0]}
    assert "within its interval over images, 1.0000 to 1.0000" in format_best({**evaluation, "epoch": 4}, evaluation)
    assert "within" not in format_best(evaluation, {**evaluation, "value": 0.5})
