"""One rule for the brightness of all pictures of a dataset, and it goes with the model wherever it is used."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

import export
import predict
import train
from annotations import value_ranges
from annotations.value_ranges import look_at_values, settle_value_range
from helpers.deep_images import save_png16
from helpers.drawn import draw_coco
from helpers.runs import QUICK
from helpers.shaken import shaken_checkpoint
from inference.trained_model import TrainedModel, load_trained_model, settle_brightness
from loading.splits import Source, load_data
from pixels.value_range import ValueRange
from runtime.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("restore_process")

MODEL = "ssdlite320_mobilenet_v3_large"
TWELVE_BITS = ValueRange(whole=(0, 4095))


def grey(path):
    """Return a picture's grey levels, of which the darkest is black and the brightest white."""
    levels = np.asarray(Image.open(path).convert("L")).astype(np.float64)
    return np.rint((levels - levels.min()) * 255 / (levels.max() - levels.min())).astype(np.uint16)


def deepen(root, deep, roles=("train", "val")):
    """Write every picture anew with the values that ``deep`` makes of its grey levels, uint16 [H, W]."""
    for role in roles:
        for path in sorted((root / f"{role}2017").iterdir()):
            Image.fromarray(deep(grey(path))).save(path)
    return root


def load(root, **options):
    return load_data(Source("coco", root, cache_dir=root.parent / "cache"), "box", **options)


def read_all(data):
    splits = [split for split in (data.train, data.val) if split is not None]
    return [split.images.read(split.annotations, i).tobytes() for split in splits for i in split.indices.tolist()]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("bits", [1, 10, 12, 16])
def test_pictures_of_any_bits_look_as_with_eight(tmp_path, caplog, bits):
    shallow = deepen(draw_coco(tmp_path / "a"), lambda levels: (levels >> max(0, 8 - bits)).astype(np.uint8))
    deep = deepen(draw_coco(tmp_path / "b"), lambda levels: (levels.astype(np.int64) << bits >> 8).astype(np.uint16))
    if bits == 1:
        deepen(shallow, lambda levels: (levels > 127).astype(np.uint8) * 255)
    data = load(deep)
    assert data.value_range == ValueRange(whole=(0, 2**bits - 1))
    assert read_all(data) == read_all(load(shallow))
    told = [text for text in warnings(caplog) if "12 looked at" in text]
    assert len(told) == (bits != 16)
    assert bits == 16 or f"0 to {2**bits - 1} ({bits} bits) is taken as black to white" in told[0]


def test_the_rule_is_one_for_dark_and_bright_pictures_and_for_both_splits(tmp_path, caplog):
    root = draw_coco(tmp_path / "data")
    deepen(root, lambda levels: levels << 2, roles=["val"])
    deepen(root, lambda levels: levels << 1, roles=["train"])
    Image.fromarray(np.full((60, 80), 4000, np.uint16)).save(root / "train2017" / "000000.png")
    data = load(root)
    assert data.value_range == TWELVE_BITS
    assert max(read_all(data)[1]) == 510 >> 4 and max(read_all(data)[-1]) == 1020 >> 4
    assert any("come out nearly black" in text for text in warnings(caplog)) is False
    Image.fromarray(np.full((60, 80), 65000, np.uint16)).save(root / "train2017" / "000000.png")
    assert load(root).value_range == ValueRange(whole=(0, 65535))
    assert any("11 of 12 picture(s) come out nearly black" in text for text in warnings(caplog))


def test_pictures_with_8_bits_settle_nothing_and_stay(tmp_path, caplog):
    root = draw_coco(tmp_path / "data")
    before = read_all(load(root))
    save_png16(np.full((60, 80, 3), 1000, np.uint16), root / "train2017" / "000000.png")
    data = load(root)
    assert data.value_range == ValueRange(whole=(0, 1023)) and read_all(data)[1:] == before[1:]
    assert set(read_all(data)[0]) == {1000 >> 2}
    assert "1 looked at" in caplog.text


def test_a_second_start_decodes_nothing_and_says_the_same(tmp_path, caplog, monkeypatch):
    root = deepen(draw_coco(tmp_path / "data"), lambda levels: levels << 4)
    first = load(root).value_range
    told = warnings(caplog)
    caplog.clear()
    monkeypatch.setattr(value_ranges, "read_values", None)
    monkeypatch.setattr(value_ranges, "read_header", None)
    assert load(root).value_range == first == TWELVE_BITS and warnings(caplog) == told


def test_a_checkpoints_rule_stays_and_misfits_are_named(tmp_path, caplog):
    root = deepen(draw_coco(tmp_path / "data"), lambda levels: levels << 6)
    known = load(root).to_plain() | {"value_range": TWELVE_BITS.to_plain()}
    caplog.clear()
    data = load(root, known=known)
    assert data.value_range == TWELVE_BITS and max(read_all(data)[0]) == 255
    (told,) = [text for text in warnings(caplog) if "beyond" in text]
    assert "12 of 12 picture(s) have values beyond 0 to 4095 (12 bits)" in told and "000000.png with 0 to 16320" in told
    assert load(root, known=known, test_only=True).value_range == TWELVE_BITS
    known.pop("value_range")  # an older checkpoint: 16 bits
    assert load(root, known=known).value_range == ValueRange(whole=(0, 65535))


def test_the_fingerprint_of_the_data_tells_rules_apart(tmp_path):
    root = draw_coco(tmp_path / "data")
    prints = {load(deepen(root, lambda levels, n=n: levels << n)).fingerprint() for n in (2, 4)}
    assert len(prints) == 2


def test_broken_files_are_passed_over_and_missing_values_named(tmp_path, caplog):
    paths = [tmp_path / f"{n}.tif" for n in range(3)]
    values = np.linspace(-1, 1, 200, dtype=np.float32).reshape(10, 20)
    Image.fromarray(values).save(paths[0])
    values[0, :3] = np.nan
    Image.fromarray(values).save(paths[1])
    paths[2].write_bytes(b"no picture")
    paths.append(save_png16(np.full((60, 80, 3), 1000, np.uint16), tmp_path / "cut.png"))
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    seen = look_at_values(4, paths.__getitem__).values
    assert [path for path, _ in seen] == paths[:2]
    assert settle_value_range(seen, ValueRange(), "data").real == (-1, 1)
    assert "1 picture(s) have values that are no numbers (NaN or infinite), such as " in caplog.text


def test_pages_and_frames_after_the_first_are_told_once_a_dataset(tmp_path, caplog):
    root = draw_coco(tmp_path / "data")
    for path, mode in ((root / "train2017" / "000001.png", "RGB"), (root / "val2017" / "000002.png", "I;16")):
        with Image.open(path) as image:
            first = (
                image.convert(mode) if mode == "RGB" else Image.fromarray(np.asarray(image)[:, :, 0].astype("u2") << 4)
            )
        first.save(path, "TIFF", save_all=True, append_images=[first])
    data = load(root)
    expected = f"2 of 12 picture(s) have several pages or frames, such as {root / 'train2017' / '000001.png'}: only the"
    assert [expected in text for text in warnings(caplog)].count(True) == 1
    known = data.to_plain()
    caplog.clear()
    load(root, known=known)  # from what is remembered of the files
    assert [expected in text for text in warnings(caplog)].count(True) == 1
    caplog.clear()
    settle_brightness(TrainedModel(*[None] * 4), sorted((root / "train2017").iterdir()))  # as predict.py does
    assert "files: 1 of 6 picture(s) have several pages or frames" in caplog.text


def test_of_large_sets_some_files_are_looked_at_spread_evenly(tmp_path, monkeypatch):
    asked = []

    def path_of(index):
        asked.append(index)
        return tmp_path / f"{index}.png"

    monkeypatch.setattr(value_ranges, "HEADERS_OF_LARGE_SETS", 5)
    for n in range(11):
        Image.fromarray(np.full((4, 4), 100 * n, np.uint16)).save(tmp_path / f"{n}.png")
    look_at_values(11, path_of)
    assert asked == list(range(11))
    monkeypatch.setattr(value_ranges, "MAX_DECODED", 3)
    assert [bounds.high for _, bounds in look_at_values(11, path_of).values] == [0, 500, 1000]
    asked.clear()
    monkeypatch.setattr(value_ranges, "MAX_HEADERS", 10)
    look_at_values(11, path_of)
    assert asked == [0, 2, 5, 7, 10]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on pictures with 12 bits; returns (data, its folder)."""
    root = tmp_path_factory.mktemp("trained")
    deepen(draw_coco(root / "data", 4), lambda levels: levels << 4)
    flags = [*QUICK, "--dataset", "coco", "--data-path", root / "data", "--model", MODEL, "--output-dir", root / "run"]
    assert train.run_as_command([*map(str, flags), "--cache-dir", str(root / "cache"), "--batch-size", "2"]) == 0
    return root / "data", root / "run"


@pytest.mark.slow
def test_the_checkpoint_keeps_the_rule_and_evaluates_by_it(trained, tmp_path, capfd):
    root, run = trained
    path = run / "weights" / "checkpoint.pth"
    assert load_checkpoint(path)["dataset"]["value_range"] == {"whole": [0, 4095], "real": None}
    assert load_trained_model(path).value_range == TWELVE_BITS
    brighter = deepen(draw_coco(tmp_path / "data", 4), lambda levels: levels << 8)
    flags = ["--dataset", "coco", "--model", MODEL, "--device", "cpu", "--workers", "0", "--test-only"]
    for data, beyond in ((root, False), (brighter, True)):
        capfd.readouterr()
        assert train.run_as_command([*flags, "--data-path", str(data), "--resume", str(path)]) == 0
        said = "".join(capfd.readouterr())
        assert ("4 of 4 picture(s) have values beyond 0 to 4095" in said) == beyond and "looked at" not in said


def predicted(checkpoint, out, *paths):
    flags = ["--checkpoint", checkpoint, *paths, "--output-dir", out, "--device", "cpu", "--workers", "0"]
    assert predict.run([*map(str, flags), "--no-overlays", "--score-threshold", "0.05"]) == 0
    return json.loads((out / "images.json").read_text())["value_range"], json.loads(
        (out / "predictions.json").read_text()
    )


def test_predict_goes_by_the_checkpoints_rule_or_by_the_pictures(tmp_path, capfd):
    checkpoint = shaken_checkpoint(tmp_path / "a.pth", MODEL)
    content = load_checkpoint(checkpoint)
    levels = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.uint16).repeat(10, 0).repeat(10, 1)
    levels[0] = 255
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(levels << 4).save(tmp_path / "deep.png")
    _, expected = predicted(checkpoint, tmp_path / "flat", tmp_path / "flat.png")
    for name, rule, told in (("own", ValueRange(), "12 bits) is taken as black to white"), ("kept", TWELVE_BITS, "")):
        content["dataset"]["value_range"] = rule.to_plain()
        save_checkpoint(content, tmp_path / f"{name}.pth")
        capfd.readouterr()
        shown, found = predicted(tmp_path / f"{name}.pth", tmp_path / name, tmp_path / "deep.png")
        assert shown == {"whole": [0, 4095], "real": None}
        assert len(found) > 4 and found == expected
        said = "".join(capfd.readouterr())
        assert told in said and (told or "black" not in said)


def test_an_export_documents_the_rule_and_is_checked_by_it(tmp_path):
    checkpoint = shaken_checkpoint(tmp_path / "a.pth", MODEL)
    content = load_checkpoint(checkpoint)
    content["dataset"]["value_range"] = TWELVE_BITS.to_plain()
    save_checkpoint(content, checkpoint)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    detector = load_trained_model(checkpoint)
    assert export.build_metadata(detector, "image", "detections")["value_range"]["whole"] == [0, 4095]
    pictures = export.load_pictures([str(tmp_path / "deep.png")], detector)
    assert float(pictures[0][1].min()) == 0 and float(pictures[0][1].max()) == 1
