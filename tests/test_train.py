"""The command line as users run it: flags, errors, training, scores that repeat."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.models.detection import roi_heads

import train
from helpers.drawn import draw_coco
from helpers.ranks import run_on_ranks
from helpers.runs import QUICK, lines, run, train_on_rank, train_once
from helpers.thin import use_thin_models
from loading.splits import COCO_NAMES
from models.architectures import ARCHITECTURES, ModelSpec, build_model
from runtime import run_folder
from runtime.trackers import Tracker
from training.run_plan import REHEARSED_STEPS, rehearse

SMALL = ["--min-size", "64", "--max-size", "100"]


pytestmark = pytest.mark.usefixtures("restore_process")


REFERENCE_DEFAULTS = {
    "data_path": "/datasets01/COCO/022719/", "dataset": "coco", "model": "maskrcnn_resnet50_fpn", "batch_size": 2,
    "epochs": 26, "workers": 4, "opt": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4,
    "norm_weight_decay": None, "lr_scheduler": "multisteplr", "lr_step_size": 8, "lr_steps": [16, 22],
    "lr_gamma": 0.1, "print_freq": 20, "resume": "", "start_epoch": 0, "aspect_ratio_group_factor": 3,
    "rpn_score_thresh": None, "trainable_backbone_layers": None, "data_augmentation": "hflip", "sync_bn": False,
    "test_only": False, "use_deterministic_algorithms": False, "world_size": 1, "dist_url": "env://", "weights": None,
    "weights_backbone": None, "amp": False, "use_copypaste": False, "backend": "pil", "use_v2": False,
}  # fmt: skip


def test_flags_of_the_reference_have_its_defaults():
    args = vars(train.get_args_parser().parse_args([]))
    assert {name: args[name] for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS


@pytest.mark.parametrize("text", ["SGD", "sgd_Nesterov", "AdamW"])
def test_reference_spellings_are_understood(text):
    args = train.get_args_parser().parse_args(
        ["--opt", text, "--lr-scheduler", "CosineAnnealingLR", "--start_epoch", "3", "--weight-decay", "0", "-j", "1"]
    )
    assert args.opt == text.lower() and args.lr_scheduler == "cosineannealinglr" and args.start_epoch == 3


BAD_FLAGS = {
    "unknown model": (["--model", "yolo"], "invalid choice: 'yolo'"),
    "unknown dataset": (["--dataset", "cifar"], "invalid choice: 'cifar'"),
    "unknown augmentation": (["--data-augmentation", "mosaic"], "invalid choice: 'mosaic'"),
    "unknown optimizer": (["--opt", "lamb"], "invalid choice: 'lamb'"),
    "zero batch": (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    "negative workers": (["--workers", "-1"], "--workers -1: must not be negative"),
    "keypoints on coco": (["--model", "keypointrcnn_resnet50_fpn"], "use one of coco_kp, custom, yolo, shapes"),
    "size of an SSD": (["--model", "ssd300_vgg16", "--min-size", "300"], "always resizes to (300, 300)"),
    "lsj with an SSD": (["--model", "ssd300_vgg16", "--data-augmentation", "lsj"], "always resizes; use ssd"),
    "copy-paste alone": (["--use-copypaste"], "--use-copypaste needs --data-augmentation lsj"),
    "copy-paste boxes": (["--use-copypaste", "--data-augmentation", "lsj", "--model", "fcos_resnet50_fpn"], "pastes masks"),
    "sigmas without keypoints": (["--kpt-oks-sigmas", "0.1"], "maskrcnn_resnet50_fpn has no keypoints"),
    "proposals of FCOS": (["--model", "fcos_resnet50_fpn", "--rpn-score-thresh", "0.1"], "no region proposals"),
    "test of nothing": (["--test-only"], "--test-only needs a model"),
    "training on tiles": (["--tile", "800"], "--tile scores a trained model on tiles: it goes with --test-only"),
    "tiny tiles": (["--test-only", "--resume", "x.pth", "--tile", "8"], "--tile 8: expected at least 32 pixels"),
    "tiles that hardly move": (
        ["--test-only", "--resume", "x.pth", "--tile", "800", "--overlap", "1"], "--overlap 1.0: expected a share from 0"
    ),
    "overlap of nothing": (["--overlap", "0.3"], "--overlap is what the tiles of --tile PIXELS share"),
    "unknown weights": (["--weights", "Nothing.COCO_V9"], "no such file and no such weights"),
    "weights of another model": (["--weights", "FCOS_ResNet50_FPN_Weights.COCO_V1"], "no such weights"),
    "missing weights file": (["--weights-backbone", "/nowhere/a.pth"], "/nowhere/a.pth: no such file"),
    "unknown device": (["--device", "tpu9"], "--device tpu9"),
    "zero size": (["--min-size", "0"], "--min-size 0: must be at least 1"),
    "layers": (["--trainable-backbone-layers", "9"], "--trainable-backbone-layers 9: expected 0 to 5"),
    "a rate that is no number": (["--lr", "nan"], "--lr nan: expected a finite number, 0 or more"),
    "a start after the end": (["--start-epoch", "30"], "--start-epoch 30: nothing is left of 26 epochs"),
    "a dry test": (["--test-only", "--resume", "x.pth", "--dry-run"], "--dry-run plans a training"),
    "files of a folder dataset": (["--dataset", "custom", "--val-annotations", "x.json"], "go with --dataset coco or coco_kp"),
    "sync-bn and compile": (["--sync-bn", "--compile"], "leave one out"),
    "images without annotations": (["--train-images", "x"], "need --train-annotations"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_end_with_code_2_and_one_line(name, capsys):
    flags, message = BAD_FLAGS[name]
    with pytest.raises(SystemExit) as exit_:
        run(*flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_data_ends_with_code_1_and_one_line(tmp_path, capsys):
    assert run(*QUICK, "--data-path", tmp_path, "--output-dir", "") == 1
    error = capsys.readouterr().err
    assert "instances_train2017.json" in error and "--data-path" in error and len(error.splitlines()) == 1


def test_missing_images_are_all_named(drawn_coco, capsys):
    (drawn_coco / "train2017" / "000002.png").unlink()
    (drawn_coco / "train2017" / "000003.png").unlink()
    flags = [*QUICK, *SMALL, "--data-path", drawn_coco, "--output-dir", ""]
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert "000002.png: no such file" in error and "000003.png: no such file" in error


def test_an_empty_dataset_is_named(drawn_coco, capsys):
    path = drawn_coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    assert run(*QUICK, *SMALL, "--data-path", drawn_coco, "--output-dir", "") == 1
    assert "no objects to train on" in capsys.readouterr().err


def test_only_one_log_line_says_that_old_flags_change_nothing(drawn_coco, capsys):
    run(*QUICK, "--data-path", drawn_coco / "nowhere", "--use-v2", "--backend", "tv_tensor", "--output-dir", "")
    assert capsys.readouterr().out.count("--use-v2 and --backend change nothing") == 1


@pytest.mark.slow
def test_a_run_leaves_checkpoints_and_metrics_and_test_only_repeats_them(drawn_coco, tmp_path):
    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "4")
    (line,) = lines(out)
    assert line["epoch"] == 0 and set(line["bbox"]) >= {"AP", "AP50", "AR"} and line["train"]["loss"] > 0
    assert line["settings"]["num_images"] == 6
    names = sorted(p.name for p in (out / "weights").glob("*.pth"))
    assert names == ["best.pth", "checkpoint.pth", "checkpoint_previous.pth", "model_0.pth"]

    shutil.rmtree(drawn_coco / "train2017")  # --test-only needs no training data
    (drawn_coco / "annotations" / "instances_train2017.json").unlink()
    again = tmp_path / "again"
    checkpoint = out / "weights" / "checkpoint.pth"
    train_once(drawn_coco, again, "--test-only", "--resume", checkpoint)
    (repeated,) = lines(again)
    assert repeated["bbox"] == line["bbox"] and repeated["per_class"] == line["per_class"]
    assert not (again / "weights").exists()


@pytest.mark.slow
def test_the_model_entry_loads_into_torchvisions_builder(drawn_coco, tmp_path):
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    train_once(drawn_coco, tmp_path / "out", "--batch-size", "4")
    content = torch.load(tmp_path / "out" / "weights" / "model_0.pth", weights_only=True)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)
    model.load_state_dict(content["model"])
    assert content["dataset"]["label_names"][:3] == ["person", "bicycle", "car"]  # COCO's own, with its 91 labels


@pytest.mark.slow
def test_resuming_takes_up_epoch_optimizer_and_rate(drawn_coco, tmp_path):
    flags = ["--batch-size", "3", "--lr-steps", "1", "--epochs", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_once(drawn_coco, whole, *flags)
    train_once(drawn_coco, parts, *flags[:-1], "1")
    train_once(drawn_coco, parts, *flags, "--resume", parts / "weights" / "checkpoint.pth")
    a, b = (torch.load(p / "weights" / "checkpoint.pth", weights_only=True) for p in (whole, parts))
    assert a["progress"] == b["progress"] == {"epoch": 2, "batches": 0, "updates": 4, "eval_due": False, "skipped": 0}
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert [line["bbox"] for line in lines(whole)] == [line["bbox"] for line in lines(parts)]


@pytest.mark.slow
def test_a_resumed_run_follows_its_own_flags_or_is_refused(drawn_coco, tmp_path, capsys):
    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "3", "--early-stop", "1", "--eval-every", "1")
    resume = ["--batch-size", "3", "--resume", out / "weights" / "checkpoint.pth", "--eval-every", "0"]
    capsys.readouterr()
    train_once(drawn_coco, out, *resume, "--epochs", "2", "--weight-decay", "0.5", "--opt", "sgd_nesterov")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "with other flags: " in line]
    named = line.split("with other flags: ")[1].split("; ")
    assert sorted(named) == ["--epochs 1, now 2", "--opt sgd, now sgd_nesterov", "--weight-decay 0.0001, now 0.5"]
    group = torch.load(out / "weights" / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and group["nesterov"]
    common = [*QUICK, "--data-path", drawn_coco, "--model", "ssdlite320_mobilenet_v3_large", "--output-dir", ""]
    assert run(*common, *resume, "--epochs", "3", "--opt", "adamw") == 1
    assert "--opt sgd_nesterov, now adamw" in capsys.readouterr().err
    assert run(*common, *resume, "--epochs", "3", "--norm-weight-decay", "0") == 1
    assert "1 group(s) of weight decay, now 2" in capsys.readouterr().err
    assert run(*common, "--batch-size", "24", "--sync-bn", "--epochs", "1", "--dry-run") == 0  # one process: no effect


@pytest.mark.slow
def test_a_run_that_was_stopped_early_does_not_go_on(drawn_coco, tmp_path, capsys):
    flags = ["--batch-size", "3", "--lr", "0", "--early-stop", "1", "--epochs", "9", "--resume", "auto"]
    for _ in range(2):
        train_once(drawn_coco, tmp_path / "out", *flags)
        assert "stopping early" in capsys.readouterr().out
        assert [line["epoch"] for line in lines(tmp_path / "out")] == [0, 1]


@pytest.mark.slow
def test_resume_auto_finds_the_newest_or_starts_anew(drawn_coco, tmp_path, capsys):
    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "3", "--resume", "auto")
    assert "starting anew" in capsys.readouterr().out
    train_once(drawn_coco, out, "--batch-size", "3", "--resume", "auto", "--epochs", "2")
    assert "continuing from" in capsys.readouterr().out
    assert [line["epoch"] for line in lines(out)] == [0, 1]


@pytest.mark.slow
def test_checkpoints_inside_an_epoch_come_by_updates_or_by_the_clock(drawn_coco, tmp_path, monkeypatch):
    from runtime.checkpoint import CheckpointFolder

    saved, save = [], CheckpointFolder.save

    def noting(self, content, **options):
        saved.append(content["progress"]["batches"])
        return save(self, content, **options)

    monkeypatch.setattr(CheckpointFolder, "save", noting)
    for flags, expected in (([], []), (["--checkpoint-every", 2], [2]), (["--checkpoint-every", "1m"], [])):
        saved.clear()
        train_once(drawn_coco, tmp_path / str(len(flags)), "--batch-size", "2", "--eval-every", "0", *flags)
        assert [batches for batches in saved if batches] == expected


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_with_both_values(drawn_coco, tmp_path, capsys):
    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "3")
    checkpoint = out / "weights" / "checkpoint.pth"
    common = [*QUICK, "--data-path", drawn_coco, "--output-dir", "", "--resume", checkpoint, "--test-only"]
    assert run(*common, "--model", "ssd300_vgg16") == 1
    error = capsys.readouterr().err
    assert "name is ssdlite320_mobilenet_v3_large" in error and "ask for ssd300_vgg16" in error
    other = draw_coco(tmp_path / "other")
    path = other / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"categories": [', '"categories": [{"id": 9, "name": "goat"}, '))
    flags = [
        "--data-path",
        other,
        "--model",
        "ssdlite320_mobilenet_v3_large",
        "--output-dir",
        "",
        "--resume",
        checkpoint,
    ]
    assert run(*QUICK, *flags) == 1
    assert "num_classes is 91, flags and data ask for 5" in capsys.readouterr().err


@pytest.mark.slow
def test_a_non_finite_loss_ends_with_code_3(drawn_coco, tmp_path, capsys):
    flags = [
        *QUICK,
        "--data-path",
        drawn_coco,
        "--model",
        "ssdlite320_mobilenet_v3_large",
        "--output-dir",
        tmp_path / "o",
    ]
    assert run(*flags, "--batch-size", "3", "--epochs", "4", "--lr", "1e30") == 3
    out = capsys.readouterr().out
    assert "loss not finite" in out and "image ids" in out and "lower --lr" in out


@pytest.mark.slow
def test_fewer_images_than_a_batch_and_empty_images_train(tmp_path):
    root = draw_coco(tmp_path / "coco", num_images=3)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 11]
    path.write_text(json.dumps(content))
    train_once(root, tmp_path / "out", "--batch-size", "8", "--keep-negatives")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hflip", "lsj", "multiscale", "ssd", "ssdlite"])
def test_all_presets_train_a_keypoint_model(tmp_path, monkeypatch, preset):
    use_thin_models(monkeypatch)
    root = draw_coco(tmp_path / "kp", num_images=3, num_keypoints=17)
    assert (
        run(*QUICK, *SMALL, "--dataset", "coco_kp", "--data-path", root, "--model", "keypointrcnn_resnet50_fpn",
            "--data-augmentation", preset, "--output-dir", "", "--eval-every", "0")
        == 0
    )  # fmt: skip


@pytest.mark.slow
def test_copy_paste_trains_a_mask_model(drawn_coco, monkeypatch):
    use_thin_models(monkeypatch)
    flags = ["--data-augmentation", "lsj", "--use-copypaste", "--output-dir", "", "--eval-every", "0"]
    assert run(*QUICK, *SMALL, "--data-path", drawn_coco, "--batch-size", "3", *flags) == 0


@pytest.mark.slow
def test_options_of_the_step_work_together(drawn_coco, tmp_path):
    flags = ["--amp", "--amp-dtype", "bfloat16", "--accumulate", "2", "--clip-grad-norm", "1", "--scale-lr"]
    flags += ["--opt", "adamw", "--norm-weight-decay", "0", "--eval-batch-size", "2", "--max-dets", "20"]
    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "2", *flags)
    (line,) = lines(out)
    assert line["settings"]["max_dets_bbox"] == [1, 10, 20]


@pytest.mark.slow
def test_coco_files_of_other_tools(tmp_path):
    """The layout that annotation tools export, categories of its own, and explicit paths."""
    root = draw_coco(tmp_path / "coco")
    export = tmp_path / "export"
    for role, name in (("train", "train"), ("val", "valid")):
        shutil.copytree(root / f"{role}2017", export / name)
        text = (root / "annotations" / f"instances_{role}2017.json").read_text()
        text = text.replace('"id": 1, "name": "person"', '"id": 0, "name": "ship"').replace(
            '"category_id": 1,', '"category_id": 0,'
        )
        (export / name / "_annotations.coco.json").write_text(text)
    out = tmp_path / "out"
    train_once(export, out, "--batch-size", "3")
    content = torch.load(out / "weights" / "checkpoint.pth", weights_only=True)
    assert content["dataset"]["label_categories"] == [0, 2, 3] and content["model_spec"]["num_classes"] == 4
    assert list(lines(out)[0]["per_class"]["bbox"]) == ["ship", "bicycle", "car"]
    paths = []
    for role, name in (("train", "train"), ("val", "valid")):
        paths += [f"--{role}-images", export / name, f"--{role}-annotations", export / name / "_annotations.coco.json"]
    train_once(tmp_path / "nowhere", tmp_path / "out2", "--batch-size", "3", *paths)
    assert lines(out)[0]["bbox"] == lines(tmp_path / "out2")[0]["bbox"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_models_train_and_score_on_shapes(tmp_path, name, monkeypatch, few_proposals):
    from loading import shapes_dataset

    monkeypatch.setattr(shapes_dataset, "NUM_IMAGES", {"train": 2, "val": 2})
    size = [] if ARCHITECTURES[name].fixed_size else ["--min-size", "48", "--max-size", "64"]
    flags = ["--dataset", "shapes", "--model", name, "--output-dir", tmp_path, "--batch-size", "2", *size]
    flags += ["--momentum", "0"]  # half of what is written to the disk
    assert run(*QUICK, *flags) == 0
    (line,) = lines(tmp_path)
    wanted = {"box": {"bbox"}, "mask": {"bbox", "segm"}, "keypoint": {"bbox", "keypoints"}}
    assert wanted[ARCHITECTURES[name].task] <= set(line)


def first_images(coco, root, count):
    """Make a dataset of the first validation images of another; returns its folder."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").symlink_to(coco / "val2017")
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [record for record in content["annotations"] if record["image_id"] in kept]
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.mark.slow
def test_one_two_and_three_processes_print_the_same_digits(tiny_coco, tmp_path):
    """On real images, from one checkpoint, at evaluation batch sizes 1 and 3; and equal to plain pycocotools."""
    torch.manual_seed(0)
    spec = ModelSpec("ssdlite320_mobilenet_v3_large", 91, trainable_layers=6)
    from runtime.checkpoint import save_checkpoint

    labels = list(range(1, 91))
    content = {
        "model": build_model(spec).state_dict(), "model_spec": spec.to_plain(),
        "progress": {"epoch": 1, "batches": 0, "updates": 1},
        "dataset": {"label_categories": labels, "label_names": list(COCO_NAMES[1:])},
    }  # fmt: skip
    path = tmp_path / "c.pth"
    save_checkpoint(content, path)
    root = first_images(tiny_coco, tmp_path / "coco", 13)  # no multiple of two or three
    figures = {}
    for processes, batch in ((1, 1), (1, 3), (2, 3), (3, 1)):
        out = tmp_path / f"{processes}-{batch}"
        flags = ["--device", "cpu", "--test-only", "--resume", path, "--data-path", root, "--output-dir", out]
        flags += ["--model", spec.name, "--eval-batch-size", batch, "--workers", processes - 1]
        assert run_on_ranks(processes, train_on_rank, flags) == [0] * processes
        (line,) = lines(out)
        figures[processes, batch] = line["bbox"], line["per_class"]
    assert figures[2, 3] == figures[1, 3] and figures[3, 1] == figures[1, 1]
    assert figures[1, 1][0]["AR"] is not None


@pytest.mark.slow
def test_predictions_of_a_run_score_to_the_runs_own_figures(drawn_coco, tmp_path):
    """The results file of a run, scored by score.py without the model, gives the figures of its log, difference 0."""
    import score

    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "2", "--lr", "0.01")
    (line,) = lines(out)
    truth, predictions = drawn_coco / "annotations" / "instances_val2017.json", out / "predictions_bbox.json"
    assert len(json.loads(predictions.read_text())) > 100
    files = ["--ground-truth", truth, "--predictions", predictions, "--json", tmp_path / "s.json"]
    assert score.run([str(file) for file in files]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["bbox"] == line["bbox"]
    content = torch.load(out / "weights" / "checkpoint.pth", weights_only=True)
    assert content["metrics"]["bbox"] == line["bbox"]
    assert content["metrics"]["settings"]["num_images"] == 6 and "score_threshold" in content["metrics"]


@pytest.mark.slow
def test_predictions_can_be_left_out(drawn_coco, tmp_path):
    train_once(drawn_coco, tmp_path / "out", "--batch-size", "3", "--no-save-predictions")
    assert not list((tmp_path / "out").glob("predictions*"))


@pytest.mark.slow
def test_epochs_without_an_evaluation_leave_their_losses(drawn_coco, tmp_path):
    out = tmp_path / "out"
    train_once(drawn_coco, out, "--batch-size", "4", "--epochs", "3", "--eval-every", "3")
    found = lines(out)
    assert [line["epoch"] for line in found] == [0, 1, 2] and ["bbox" in line for line in found] == [False, False, True]
    assert all(line["train"]["loss"] > 0 and line["train"]["lr"] > 0 for line in found)
    events = EventAccumulator(str(out)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2]
    assert [event.step for event in events.Scalars("bbox/AP")] == [2]


@pytest.mark.slow
def test_a_second_run_moves_the_first_aside_whole_and_says_where(drawn_coco, tmp_path, capsys, monkeypatch):
    out, flags = tmp_path / "out", ["--batch-size", "4", "--eval-every", "0"]
    train_once(drawn_coco, out, *flags)
    first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert b"1 process(es) on cpu" in first[Path("log.txt")] and b"training took" in first[Path("log.txt")]
    capsys.readouterr()
    train_once(drawn_coco, out, *flags, "--seed", "1")
    (aside,) = tmp_path.glob("out_*")
    assert f"{out} held a run that is not continued (--resume auto would): it is now {aside}" in capsys.readouterr().out
    kept = {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    assert {**kept, Path(".lock"): b""} == {**first, Path(".lock"): b""}
    weights = [torch.load(f / "weights" / "model_0.pth", weights_only=True)["args"]["seed"] for f in (aside, out)]
    assert weights == [0, 1]

    # One that is continued stays where it is: named by file, by folder, by auto, or by a restart of torchrun.
    for number, resume in enumerate((out / "weights" / "checkpoint.pth", out, "auto", ""), start=2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0" if resume else "1")
        more = ["--resume", resume] if resume else []
        train_once(drawn_coco, out, *flags, *more, "--seed", "1", "--epochs", number)
        assert len(list(tmp_path.glob("out_*"))) == 1 and len(lines(out)) == number


def test_a_run_in_the_working_folder_is_not_moved(drawn_coco, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (out / "weights").mkdir(parents=True)
    (out / "weights" / "model_0.pth").write_bytes(b"precious")
    monkeypatch.chdir(out)
    assert run(*QUICK, "--data-path", drawn_coco, "--model", "ssdlite320_mobilenet_v3_large", "--output-dir", ".") == 1
    assert "cannot be moved aside as it is the working folder; continue it with --resume" in capsys.readouterr().err
    assert (out / "weights" / "model_0.pth").read_bytes() == b"precious"


@pytest.mark.slow
def test_the_checkpoint_says_which_model_it_is(drawn_coco, tmp_path, capsys):
    train_once(drawn_coco, tmp_path / "out", "--batch-size", "4", "--eval-every", "0")
    flags = ["--data-path", drawn_coco, "--resume", tmp_path / "out" / "weights" / "checkpoint.pth"]
    assert run(*QUICK, *flags, "--test-only") == 0
    assert "IoU metric: bbox" in capsys.readouterr().out
    assert run(*QUICK, *flags, "--test-only", "--model", "retinanet_resnet50_fpn") == 1
    assert "name is ssdlite320_mobilenet_v3_large, flags and data ask for retinanet" in capsys.readouterr().err
    assert run(*QUICK, *flags, "--output-dir", tmp_path / "out", "--epochs", "2", "--eval-every", "0") == 0
    assert [line["epoch"] for line in lines(tmp_path / "out")] == [0, 1]


@pytest.mark.slow
def test_a_rehearsal_takes_the_steps_of_training(drawn_coco, monkeypatch):
    """In float16 with a scaler, and with as many batches per update."""
    seen = []
    monkeypatch.setattr(
        train, "rehearse", lambda plan, model, options: seen.append(options) or rehearse(plan, model, options)
    )
    flags = ["--data-path", drawn_coco, "--model", "ssdlite320_mobilenet_v3_large", "--output-dir", "", "--dry-run"]
    assert run(*QUICK, *flags, "--amp", "--amp-dtype", "float16", "--accumulate", "2") == 0
    (options,) = seen
    state = options.scaler.state_dict()
    assert options.accumulate == 2 and (state["scale"] != 65536.0 or state["_growth_tracker"] == 1 + REHEARSED_STEPS)


class Heard(Tracker):
    """Notes what it hears of, and what holds for the whole process meanwhile."""

    def __init__(self):
        self.of, self.settings = set(), []

    def on_step(self, record):
        self.of.add("step")
        self.settings.append(process_settings())

    def on_update(self, record, may_save):
        self.of.add("update")

    def on_epoch(self, epoch, averages):
        self.of.add("epoch")

    def on_scores(self, epoch, averages, scores):
        self.of.add("scores")


def process_settings():
    cudnn = torch.backends.cudnn
    strict = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return cudnn.deterministic, cudnn.benchmark, *strict, roi_heads.roi_align


def test_a_run_from_python_returns_its_figures_and_leaves_the_process_alone(tmp_path, drawn_coco, monkeypatch):
    """What writes into its folder hears of every step, update, epoch and evaluation."""
    build, heard, before = run_folder.build_trackers, Heard(), process_settings()
    monkeypatch.setattr(run_folder, "build_trackers", lambda folder: [*build(folder), heard])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    flags = ["--data-path", drawn_coco, "--model", "ssdlite320_mobilenet_v3_large", "--batch-size", "2"]
    flags = [str(flag) for flag in [*QUICK, *flags]]
    figures = train.run([*flags, "--output-dir", str(tmp_path / "a"), "--use-deterministic-algorithms"])
    assert heard.of == {"step", "update", "epoch", "scores"}
    assert heard.settings[0][2:4] == (True, ":4096:8") and heard.settings[0][4] is not before[4]
    assert process_settings() == before
    (line,) = lines(tmp_path / "a")
    assert figures["bbox"] == line["bbox"] and "AP" in figures["bbox"] and figures["per_class"] == line["per_class"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    again = train.run([*flags, "--test-only", "--resume", str(tmp_path / "a" / "weights" / "checkpoint.pth")])
    assert again["bbox"] == figures["bbox"]
    assert train.run([*flags, "--dry-run"]) == {}
    assert process_settings() == before


def test_a_failure_is_an_error_in_python(tmp_path, drawn_coco):
    flags = [*QUICK, "--model", "ssdlite320_mobilenet_v3_large", "--output-dir", str(tmp_path / "a")]
    with pytest.raises(train.SetUpError, match="nowhere"):
        train.run([*flags, "--data-path", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        train.run([*flags, "--epochs", "many"])
    assert ended.value.code == 2
