"""Tiles in predict.py, the interface for Python and train.py --test-only: all the same, for every model."""

import json

import numpy as np
import pytest
from PIL import Image

import predict
import score
from coco_utils import to_coco
from helpers.ranks import run_on_ranks
from helpers.runs import train_on_rank
from helpers.shaken import shaken_checkpoint
from helpers.thin import use_thin_models
from inference.detector import Detector
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from models.architectures import ARCHITECTURES
from runtime.checkpoint import load_checkpoint, save_checkpoint

NINE = [name for name in ARCHITECTURES if not name.endswith("_v2")]
MASKS, POINTS = "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Drawn pictures of 120 to 256 pixels a side in COCO's layout, with masks and keypoints."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    annotations = shapes_annotations("val", 4)
    content = to_coco(annotations)
    for n, record in enumerate(content["images"]):
        record["file_name"] = f"{n}.png"
        Image.fromarray(ShapeDrawer("val").read(annotations, n)).save(root / "val2017" / f"{n}.png")
    for kind in ("instances", "person_keypoints"):
        (root / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(content))
    return root


def truth_of(root):
    return root / "annotations" / "person_keypoints_val2017.json"


def written(checkpoint, sources, out, *flags):
    """Return the records that predict.py writes."""
    flags = ["--checkpoint", checkpoint, "--output-dir", out, "--device", "cpu", "--workers", "0", *flags]
    assert predict.run([str(flag) for flag in [*sources, *flags, "--no-overlays"]]) == 0
    return json.loads((out / "predictions.json").read_text())


def what_was_found(root, records, out):
    """Write a dataset of the same pictures whose truth are records of predict.py: random weights find nothing else."""
    content = json.loads(truth_of(root).read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    content["annotations"] = []
    for category in content["categories"]:
        category["id"] += 6  # as the checkpoint has them
    for n, record in enumerate(records):
        x, y, width, height = record["bbox"]
        right, bottom = min(x + width, sizes[record["image_id"]][0]), min(y + height, sizes[record["image_id"]][1])
        entry = {"id": n + 1, "iscrowd": 0, "area": width * height, "bbox": [x, y, right - x, bottom - y]}
        if "keypoints" in record:
            entry["num_keypoints"] = len(record["keypoints"]) // 3
            entry["keypoints"] = [v if i % 3 < 2 else 2 for i, v in enumerate(record["keypoints"])]
        content["annotations"].append({**record, **entry})
    (out / "annotations").mkdir(parents=True)
    (out / "val2017").symlink_to(root / "val2017")
    for kind in ("instances", "person_keypoints"):
        (out / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(content))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NINE)
def test_every_model_finds_the_same_from_python_and_small_pictures_are_untouched(name, shapes, tmp_path, monkeypatch):
    if ARCHITECTURES[name].has_proposals:
        use_thin_models(monkeypatch)
    checkpoint = shaken_checkpoint(tmp_path / "a.pth", name)
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    for path, drawn, (height, width) in zip(paths, (0, 3), ((90, 100), (100, 160))):  # the large one in two tiles
        pixels = np.asarray(Image.open(shapes / "val2017" / f"{drawn}.png"))
        Image.fromarray(pixels[:height, :width]).save(path)
    tiled = Detector.load(checkpoint, device="cpu", score_threshold=0.1, tile=110, overlap=0.3)
    small, large = tiled(paths)
    flags = ["--score-threshold", "0.1", "--batch-size", "1", "--tile", "110", "--overlap", "0.3"]
    records = written(checkpoint, paths, tmp_path / "out", *flags)
    assert records == json.loads(json.dumps(small.to_coco(1) + large.to_coco(2)))
    assert len(small) and len(large) and (np.diff(large.scores) <= 0).all()
    assert {"tile": 110, "overlap": 0.3}.items() <= json.loads((tmp_path / "out" / "images.json").read_text()).items()

    plain = Detector.load(checkpoint, device="cpu", score_threshold=0.1)
    assert plain(paths[0]).to_coco(1) == small.to_coco(1)
    height, width = large.size
    assert (large.boxes >= 0).all() and (large.boxes <= np.array([width, height, width, height]) + 0.001).all()
    assert large.boxes[:, 2].max() > 110
    if large.keypoints is not None:
        assert np.isfinite(large.keypoints).all() and large.keypoints[..., 0].max() > 110
    assert large.masks is None or large.masks.shape == (len(large), height, width)
    large.draw()


@pytest.mark.slow
@pytest.mark.parametrize("name", [MASKS, POINTS])
@pytest.mark.usefixtures("restore_process")
def test_scores_on_tiles_are_those_of_what_predict_finds_for_any_number_of_processes(
    name, shapes, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        use_thin_models(patch)
        checkpoint = shaken_checkpoint(tmp_path / "a.pth", name)
        ids = ["--ids-from", truth_of(shapes), "--score-threshold", "0", "--batch-size", "2"]
        records = written(checkpoint, [shapes / "val2017"], tmp_path / "predicted", *ids, "--tile", "100")
    root = what_was_found(shapes, records[::4], tmp_path / "found")
    flags = ["--dataset", "coco_kp" if name == POINTS else "coco", "--data-path", root, "--test-only"]
    content = {**load_checkpoint(checkpoint), "progress": {}}
    save_checkpoint(content, checkpoint)
    flags += ["--resume", checkpoint, "--model", name, "--device", "cpu", "--workers", "0", "--eval-batch-size", "2"]
    flags += ["--tile", "100"]
    kinds = {MASKS: ["bbox", "segm"], POINTS: ["bbox", "keypoints"]}[name]
    counts = (1, 2) if name == POINTS else (2,)
    for processes in counts:
        out = tmp_path / f"{processes}"
        assert run_on_ranks(processes, train_on_rank, [*flags, "--output-dir", out], True) == [0] * processes
    ends = [json.loads((tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()[-1]) for n in counts]
    truth, predicted = truth_of(root), tmp_path / "predicted" / "predictions.json"
    for kind in kinds:
        assert ends[0][kind] == ends[-1][kind] and ends[0][kind]["AP"] > 0.1
        results = [json.loads((tmp_path / str(n) / f"predictions_{kind}.json").read_text()) for n in counts]
        assert results[0] == results[-1]
    figures = tmp_path / "figures.json"
    assert score.run([*map(str, ["--ground-truth", truth, "--predictions", predicted, "--json", figures])]) == 0
    scored = json.loads(figures.read_text())
    assert {kind: scored[kind] for kind in kinds} == {kind: ends[0][kind] for kind in kinds}
    assert {"tile": 100, "overlap": 0.2}.items() <= ends[0]["settings"].items()
