"""Each of the nine models scores the same digits on one and on three processes, and in any workers' hands."""

import json
import multiprocessing
import tempfile
from pathlib import Path

import pytest
import torch

from coco_eval import CocoEvaluator
from evaluation.eval_result import EvalResult
from helpers.ranks import run_on_ranks
from helpers.shaken import limit_proposals, shake
from loading.loaders import build_val_loader
from loading.split import Split
from loading.splits import Data, Source, load_data
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from training.evaluate_model import EvalSetup, Evaluation, evaluate_model
from utils import Distributed

NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]
NUM_IMAGES = 4  # not the same number for each of three processes


def test_a_validation_loss_that_is_not_finite_is_none_in_plain_values():
    """As in metrics.jsonl: NaN is no JSON."""
    result = EvalResult({"bbox": {"AP": 0.5}}, {}, {})
    plain = Evaluation(result, None, losses={"loss": float("nan"), "loss_a": float("inf"), "loss_b": 0.5}).to_plain()
    assert plain["val_loss"] == {"loss": None, "loss_a": None, "loss_b": 0.5}
    json.dumps(plain, allow_nan=False)


def first_images(data):
    """Cut the validation split down."""
    val = data.val
    few = Split(val.name, val.annotations, val.images, val.indices[:NUM_IMAGES], val.skeleton)
    return Data(None, few, data.label_map, data.flip_order, data.sigmas)


def shaken_model(spec, path):
    """Build a model once, for all processes that score it."""
    if not path.exists():
        torch.manual_seed(0)
        model = build_model(spec)
        shake(model)
        torch.save(model, path)
    return torch.load(path, weights_only=False, mmap=True)


def _score(rank, world_size, root, folder, models):
    """Return every figure of every model, and the bytes of its results files on the first process."""
    multiprocessing.set_start_method("fork", force=True)  # for loading processes, as in a run of its own
    here = Distributed(rank, rank, world_size, torch.device("cpu"))
    limit_proposals(pytest.MonkeyPatch())  # for good: this process is the test's
    found = {}
    for name in NINE:
        task = ARCHITECTURES[name].task
        source = Source("coco_kp" if task == "keypoint" else "coco", Path(root), cache_dir=Path(folder) / "cache")
        data = first_images(load_data(source, task, test_only=True))
        sizes = {} if name.startswith("ssd") else {"min_size": (96,), "max_size": 160}
        keypoints = data.num_keypoints if task == "keypoint" else 0
        spec = ModelSpec(name, data.label_map.num_classes, keypoints, detections_per_img=10, **sizes)
        model = shaken_model(spec, Path(models) / name)
        loader = build_val_loader(data, here, batch_size=1, workers=int(world_size > 1))
        evaluator = CocoEvaluator(data.val.annotations, spec.iou_types, indices=data.val.indices, sigmas=data.sigmas)
        out = Path(folder) / name
        evaluation = evaluate_model(model, EvalSetup(loader, evaluator, data.label_map), predictions_dir=out)
        files = {p.name: p.read_text() for p in sorted(out.glob("predictions_*.json"))} if rank == 0 else None
        found[name] = evaluation.result.metrics, evaluation.result.per_class, files
    return found


@pytest.mark.slow
def test_nine_models_score_the_same_on_any_number_of_processes(tiny_coco, tmp_path):
    with tempfile.TemporaryDirectory() as models:
        alone = run_on_ranks(1, _score, tiny_coco, tmp_path / "1", models)[0]
        ranks = run_on_ranks(3, _score, tiny_coco, tmp_path / "3", models)
    for name, (metrics, _, files) in alone.items():
        assert len(files) == len(metrics) and all(len(text) > 1000 for text in files.values()), name
    for name in NINE:
        assert ranks[0][name] == alone[name], name
        assert all(found[name][:2] == alone[name][:2] for found in ranks), name
