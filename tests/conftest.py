"""A drawn COCO dataset in tmp_path, real photographs where they are at hand, and train.py as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("DETECTION_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Keep every test's caches to itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _real(name):
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"real images are not at hand ({folder}); set DETECTION_TEST_DATA")
    return folder


@pytest.fixture
def tiny_coco():
    return _real("tiny_coco")


@pytest.fixture
def glue_tubes(tmp_path):
    """A copy that runs may write into."""
    return Path(shutil.copytree(_real("glue_tubes"), tmp_path / "glue_tubes"))


def draw_coco(root, num_images=6, *, sizes=((60, 80), (80, 60), (64, 64)), num_keypoints=0, seed=0):
    """Write a dataset in COCO's layout; every image has objects, one object is a crowd."""
    rng = np.random.default_rng(seed)
    kind = "person_keypoints" if num_keypoints else "instances"
    names = ["person"] if num_keypoints else ["person", "bicycle", "car"]
    for role in ("train", "val"):
        folder = root / f"{role}2017"
        folder.mkdir(parents=True, exist_ok=True)
        images, objects = [], []
        for i in range(num_images):
            height, width = sizes[i % len(sizes)]
            image = Image.new("RGB", (width, height), tuple(rng.integers(0, 100, 3).tolist()))
            draw = ImageDraw.Draw(image)
            for k in range(int(rng.integers(1, 4))):
                w, h = rng.integers(12, 30, 2)
                x, y = rng.integers(0, width - w), rng.integers(0, height - h)
                draw.rectangle((x, y, x + w - 1, y + h - 1), fill=tuple(rng.integers(150, 255, 3).tolist()))
                record = {
                    "id": len(objects) + 1,
                    "image_id": 10 + i,
                    "category_id": int(rng.integers(1, len(names) + 1)),
                    "bbox": [int(x), int(y), int(w), int(h)],
                    "area": int(w * h),
                    "iscrowd": 0,
                    "segmentation": [[int(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]],
                }
                if num_keypoints:
                    points = np.stack(
                        [rng.integers(x, x + w, num_keypoints), rng.integers(y, y + h, num_keypoints)], axis=1
                    )
                    record["keypoints"] = [int(v) for px, py in points for v in (px, py, 2)]
                    record["num_keypoints"] = num_keypoints
                if i == 0 and k == 0 and not num_keypoints:
                    record["iscrowd"] = 1
                    counts = [0, height * width // 2, height * width - height * width // 2]
                    record["segmentation"] = {"size": [height, width], "counts": counts}
                objects.append(record)
            name = f"{i:06d}.png"
            image.save(folder / name)
            images.append({"id": 10 + i, "file_name": name, "height": height, "width": width})
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
        if num_keypoints == 17:
            from keypoints import COCO_PERSON_KEYPOINTS

            categories[0].update(keypoints=list(COCO_PERSON_KEYPOINTS), skeleton=[[1, 2], [1, 3]])
        path = root / "annotations" / f"{kind}_{role}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return root


@pytest.fixture
def drawn_coco(tmp_path):
    return draw_coco(tmp_path / "coco")


def run_train(*flags, processes=1, timeout=600, env=None, script="train.py", check=True):
    """Run a script of the suite in processes of its own; returns the finished process with its output as text."""
    command = [sys.executable, script]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, script]
    done = subprocess.run(
        [*command, *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{command} {flags} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
