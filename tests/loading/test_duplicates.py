"""Copies of a picture are found however they were saved; different pictures are not called copies."""

import concurrent.futures
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from annotations.arrays import locked
from annotations.findings import Findings
from annotations.record_checks import Rules
from coco_utils import annotations_from_records
from loading.duplicates import Fingerprints, find_equal_pairs, fingerprint_images, group_equal
from loading.samples import ImageFolder
from pixels.images import BadImageError


def landscape(seed, size=(90, 120)):
    """Draw a picture with structure at every scale."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size[::-1], Image.Resampling.BICUBIC)


def fingerprints(root, names, **options):
    images = [{"id": k, "file_name": name, "height": 1, "width": 1} for k, name in enumerate(names)]
    rules = Rules("test", str, str)
    annotations = annotations_from_records(images, [], [{"id": 1, "name": "thing"}], rules, Findings())
    return fingerprint_images(annotations, ImageFolder(root), np.arange(len(names)), **options)


COPIES = {
    "smaller": lambda im: im.resize((im.width // 2, im.height // 2)),
    "brighter": lambda im: im.point(lambda v: min(255, int(v * 1.1))),
    "grey": lambda im: im.convert("L"),
    "blurred": lambda im: im.filter(ImageFilter.GaussianBlur(1)),
    "cropped": lambda im: im.crop((1, 1, im.width - 1, im.height - 1)),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_changed_copy_is_found_and_nothing_else(tmp_path, change):
    names = [f"{seed}.jpg" for seed in range(8)]
    for seed, name in enumerate(names):
        landscape(seed).save(tmp_path / name)
    COPIES[change](landscape(3)).save(tmp_path / "copy.jpg", quality=50)
    assert list(find_equal_pairs(fingerprints(tmp_path, [*names, "copy.jpg"]))) == [(8, 3, False)]


def test_equal_files_are_told_from_equal_looks_inside_a_split_and_between_two(tmp_path):
    for name, seed in (("a.png", 0), ("b.png", 1), ("c.png", 0), ("d.png", 2)):
        landscape(seed).save(tmp_path / name)
    landscape(1).save(tmp_path / "e.jpg")
    first = fingerprints(tmp_path, ["a.png", "b.png", "c.png"])
    assert list(find_equal_pairs(first)) == [(2, 0, True)]
    assert list(find_equal_pairs(fingerprints(tmp_path, ["d.png", "e.jpg", "c.png"]), first)) == [
        (1, 1, False),
        (2, 0, True),
    ]


def test_flat_pictures_and_noise_are_no_copies(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.new("RGB", (40, 40), (60 * k, 10, 10)).save(tmp_path / f"flat{k}.png")
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"noise{k}.png")
    names = [f"{kind}{k}.png" for kind in ("flat", "noise") for k in range(4)]
    assert not list(find_equal_pairs(fingerprints(tmp_path, names)))


def test_rotated_by_exif_and_16_bit_pictures_are_seen_as_they_are_shown(tmp_path):
    image = landscape(5)
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = fingerprints(tmp_path, ["upright.png", "turned.png", "deep.png"])
    assert [pair[:2] for pair in find_equal_pairs(found)] == [(1, 0), (2, 0)]
    assert found.orientations.tolist() == [1, 6, 1] and found.modes[2].startswith("I")


def test_known_files_are_not_opened_again_until_they_change(tmp_path, monkeypatch):
    landscape(0).save(tmp_path / "a.png")
    before = fingerprints(tmp_path, ["a.png"], cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("loading.duplicates._look_at", lambda path: pytest.fail("opened"))
        again = fingerprints(tmp_path, ["a.png"], cache_dir=tmp_path / "cache")
    assert again.digests == before.digests and (again.thumbnails == before.thumbnails).all()
    landscape(1).save(tmp_path / "a.png")
    assert fingerprints(tmp_path, ["a.png"], cache_dir=tmp_path / "cache").digests != before.digests


def test_a_process_that_waits_for_another_takes_what_that_one_has_seen(tmp_path, monkeypatch):
    landscape(0).save(tmp_path / "a.png")
    seen = fingerprints(tmp_path, ["a.png"], cache_dir=tmp_path / "other")
    (memory,) = (tmp_path / "other").glob("looks-*.json")
    monkeypatch.setattr("loading.duplicates._look_at", lambda *args, **options: pytest.fail("opened"))
    cache = tmp_path / "cache"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with locked(cache / f"{memory.stem}.lock", "the test"):
            waiting = pool.submit(fingerprints, tmp_path, ["a.png"], cache_dir=cache)
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(timeout=0.3)
            shutil.copy(memory, cache)
        assert waiting.result(timeout=30).digests == seen.digests


def test_groups_are_what_pairs_link_in_any_order():
    """Against a plain loop over all pairs, with chains whose ends do not look the same."""
    rng = np.random.default_rng(0)
    looks = []
    for _ in range(6):
        looks.append(rng.integers(0, 255, (16, 17)))
        for _ in range(4):  # a step changes some differences, several steps too many
            step = looks[-1].copy()
            step[rng.integers(16, size=9), rng.integers(17, size=9)] = rng.integers(0, 255, 9)
            looks.append(step)
    digests = [str(k) for k in range(28)] + ["3", "12"]  # two are the same file as others, whatever they look like
    order = rng.permutation(30)

    def prints(chosen):
        thumbnails = np.array([looks[k] for k in chosen], dtype=np.uint8)
        count = len(chosen)
        ones, levels = np.ones(count, dtype=np.int64), np.zeros((count, 2), dtype=np.uint8)
        return Fingerprints(np.arange(count), [digests[k] for k in chosen], thumbnails, ones, ["L"] * count, levels)

    def same(a, b):
        return digests[a] == digests[b] or bool(list(find_equal_pairs(prints([a]), prints([b]))))

    group = np.arange(30)
    for a in range(30):
        for b in range(30):
            if same(a, b):
                group[group == group[a]] = group[b]
    assert any(group[a] == group[b] and not same(a, b) for a in range(30) for b in range(a))
    assert 3 < len(set(group.tolist())) < 30
    found = group_equal(prints(order))
    assert ((found[:, None] == found) == (group[order][:, None] == group[order])).all()


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    landscape(0).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImageError, match=r"a\.png: cannot decode the image"):
        fingerprints(tmp_path, ["a.png"])
