"""File names of COCO files against what lies on disk: other spellings are found, other files are named."""

import json
import shutil

import pytest

from annotations.findings import BadDataError
from helpers.drawn import draw_coco
from loading.splits import Source, load_data


def load(root, **options):
    return load_data(Source("coco", root, cache_dir=root.parent / "cache", **options), "box")


def rename(root, change):
    """Change the file names in the training json; returns the new ones."""
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = change(image["file_name"])
    path.write_text(json.dumps(content))
    return [image["file_name"] for image in content["images"]]


@pytest.fixture
def root(tmp_path):
    return draw_coco(tmp_path / "coco")


def read_all(split):
    return [split.images.read(split.annotations, i).tobytes() for i in split.indices.tolist()]


@pytest.mark.parametrize(
    ("on_disk", "in_json"),
    [
        ("images/{}", "images\\{}"),  # an export made on Windows
        ("U\u0308bung e\u0301 {}", "\u00dcbung \u00e9 {}"),  # unpacked on macOS
        ("\u00dcbung/{}", "U\u0308bung\\{}"),
        ("images/{}", "./images//{}"),
    ],
)
def test_other_spellings_of_a_name_are_found(root, caplog, on_disk, in_json):
    before = read_all(load(root).train)
    folder = root / "train2017"
    for path in list(folder.iterdir()):
        (folder / on_disk.format(path.name)).parent.mkdir(exist_ok=True)
        path.rename(folder / on_disk.format(path.name))
    rename(root, in_json.format)
    caplog.clear()
    for _ in range(2):  # the second time from the cache of annotations
        data = load(root)
        assert len(data.train.indices) == 6 and read_all(data.train) == before
    told = "6 of 6 names are written differently on disk" in caplog.text
    assert told == ("./" not in in_json) and "not used" not in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("000000.PNG", "000000.png differs in upper and lower case"),
        ("day/000000.png", "000000.png has this name in another folder"),
        ("000000.jpg", "000000.png has another suffix"),
        (" 000000.png", "000000.png differs in blanks"),
        ("000000", "000000.png has a suffix, file_name has none"),
        ("%30%30%30000.png", "000000.png is what its %-codes say"),
        ("none.png", "no such file; add it"),
    ],
)
def test_a_missing_file_says_which_may_be_meant(root, name, reason):
    rename(root, lambda old: name if old == "000000.png" else old)
    with pytest.raises(BadDataError) as caught:
        load(root)
    (line,) = str(caught.value).splitlines()[1:]
    assert str(root / "train2017" / name) in line and reason in line


OTHERS = {
    "the other split's folder": (lambda name: f"v{name}", "val2017", "val2017 has them: give that folder, or the"),
    "the folder above": (lambda name: f"pictures/{name}", "pictures", "coco has them: give that folder"),
    "a sub-folder": (lambda name: name, "train2017/day", "train2017/day has them: give that folder"),
    "an archive": (
        lambda name: f"z{name}",
        "val2017",
        "the folder holds no pictures at all, but 1 other file(s), such as t.",
    ),
    "no suffix": (lambda name: name[:-4], "train2017", "000000.png has a suffix, file_name has none; give the folder"),
    "nowhere": (lambda name: f"x{name}", "val2017", "no such file; give the folder that has them (--train-images"),
}


@pytest.mark.parametrize("where", OTHERS)
@pytest.mark.parametrize("on_bad_data", ["error", "skip"])
def test_nearly_all_missing_is_said_once_with_the_folder_that_has_them(root, where, on_bad_data):
    change, folder, expected = OTHERS[where]
    names = rename(root, change)
    (root / folder).mkdir(exist_ok=True)
    for old, new in zip([f"{i:06d}.png" for i in range(6)], names):
        if where != "nowhere":
            if where == "an archive":
                (root / "train2017" / "t.zip").touch()
            (root / "train2017" / old).rename(root / folder / (new if where != "no suffix" else old).rpartition("/")[2])
    with pytest.raises(BadDataError) as caught:
        load(root, on_bad_data=on_bad_data)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"{root / 'train2017'}: 6 of 6 images are not there, such as {names[0]!r}: ")
    assert expected in line


def test_a_part_of_the_pictures_can_be_used_with_skip(root, caplog):
    rename(root, lambda old: old if old == "000000.png" else f"x{old}")
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"] += [{**content["images"][1], "id": i, "file_name": f"{i}.png"} for i in range(100, 110)]
    path.write_text(json.dumps(content))
    assert load(root, on_bad_data="skip").train.indices.tolist() == [0]
    assert "15 of 16 images are not there, such as 'x000001.png': no such file; they are left out" in caplog.text


def test_two_files_spelled_alike_are_not_chosen_from(root):
    folder = root / "train2017" / "x"
    folder.mkdir()
    for name in ("e\u0301.png", "\u00e9.png"):
        shutil.copy(root / "train2017" / "000000.png", folder / name)
    rename(root, lambda old: "x\\\u00e9.png" if old == "000000.png" else old)
    with pytest.raises(BadDataError, match="2 that are spelled alike"):
        load(root)


def test_links_inside_the_folder_are_followed_and_counted(root, caplog):
    before = read_all(load(root).train)
    pool = root.parent / "pool"
    shutil.move(root / "train2017", pool)
    (root / "train2017").mkdir()
    for path in pool.iterdir():
        (root / "train2017" / path.name).symlink_to(path)
    caplog.clear()
    assert read_all(load(root).train) == before
    assert f"6 image(s) are links to files outside it, such as 000000.png -> {pool / '000000.png'}" in caplog.text


@pytest.mark.parametrize(
    "name", ["../pool/a.png", "linked/../../pool/a.png", "linked\\..\\..\\pool\\a.png", "/etc/a.png"]
)
def test_names_that_leave_the_folder_are_refused_beside_links_too(root, name):
    pool = root / "pool"
    pool.mkdir()
    shutil.copy(root / "train2017" / "000000.png", pool / "a.png")
    (root / "train2017" / "linked").symlink_to(pool)
    rename(root, lambda old: name if old == "000000.png" else old)
    with pytest.raises(BadDataError, match="name a file inside the image folder"):
        load(root)
    rename(root, lambda old: "linked/a.png" if old == name else old)
    assert len(load(root).train.indices) == 6


@pytest.mark.parametrize("target", ["nothing.png", "/dev/zero"])
def test_links_to_no_regular_file_are_refused(root, target):
    path = root / "train2017" / "000000.png"
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(BadDataError, match=r"000000\.png: (a link to nothing|no regular file)"):
        load(root)


def test_pictures_that_no_entry_names_are_counted(root, caplog):
    load(root)
    assert "not used" not in caplog.text
    (root / "train2017" / "more").mkdir()
    for name in ("x.JPG", "more/y.heic", "notes.txt"):
        shutil.copy(root / "train2017" / "000000.png", root / "train2017" / name)
    load(root)
    assert "train2017: 2 picture(s) that no entry of" in caplog.text and "not used: more/y.heic, x.JPG" in caplog.text


def test_splits_that_share_a_folder_use_each_others_pictures(root, caplog):
    shared = root / "train2017"
    for path in (root / "val2017").iterdir():
        shutil.copy(path, shared / f"val_{path.name}")
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"0000', '"val_0000'))
    paths = {role: (str(shared), str(root / "annotations" / f"instances_{role}2017.json")) for role in ("train", "val")}
    load(root, paths=paths)
    assert "not used" not in caplog.text
    shutil.copy(shared / "000000.png", shared / "extra.png")
    load(root, paths=paths)
    assert caplog.text.count("not used") == 1 and "1 picture(s) that no entry" in caplog.text
