"""What the loader delivers against the plain way: Pillow decodes, transforms work on whole pictures, one after another."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from coco_utils import read_coco
from group_by_aspect_ratio import EvalBatchSampler
from loading.loaders import DeviceLoader
from loading.samples import DetectionDataset, ImageFolder
from loading.splits import label_map_for
from pixels.lazy_image import LazyImage
from presets import build_transforms
from transforms import RandomIoUCrop

CPU = torch.device("cpu")


def write_photographs(folder, num_images=6):
    """JPEGs with one box each; returns the path of their json."""
    import json

    rng = np.random.default_rng(0)
    images, objects = [], []
    for i in range(num_images):
        height, width = ((120, 160), (160, 121))[i % 2]
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "height": height, "width": width})
        objects.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [10, 20, 80, 70], "iscrowd": 0})
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "a"}]}))
    return path


def delivered(folder, path, preset, workers, **options):
    """Image and target of every photograph, through the loader."""
    annotations = read_coco(path)
    transforms = build_transforms(preset, min_size=200, max_size=260)
    dataset = DetectionDataset(
        annotations, ImageFolder(folder), label_map_for(annotations), transforms=transforms, seed=3, **options
    )
    loader = DeviceLoader(dataset, EvalBatchSampler(len(dataset), batch_size=2), workers=workers, device=CPU)
    for images, targets in loader:
        for image, target in zip(images, targets):
            picture = Image.open(folder / annotations.file_name(int(target["image_id"]) - 1))
            yield image, target, picture


def mirrored(target, width, original=(10.0, 20.0, 90.0, 90.0), ratio=(1.0, 1.0)):
    """Whether the target's only box is the mirrored original; fails if it is neither that nor the original."""
    x1, y1, x2, y2 = original[0] * ratio[0], original[1] * ratio[1], original[2] * ratio[0], original[3] * ratio[1]
    (box,) = target["boxes"].tolist()
    if box == pytest.approx([x1, y1, x2, y2], abs=1e-3):
        return False
    assert box == pytest.approx([width - x2, y1, width - x1, y2], abs=1e-3)
    return True


@pytest.mark.parametrize("workers", [0, 2])
def test_hflip_differs_from_pillow_and_to_dtype_by_nothing(tmp_path, workers):
    path = write_photographs(tmp_path)
    seen = set()
    for image, target, picture in delivered(tmp_path, path, "hflip", workers):
        expected = tvf.to_dtype(tvf.pil_to_tensor(picture), torch.float32, scale=True)
        flipped = mirrored(target, picture.width)
        seen.add(flipped)
        assert torch.equal(image, expected.flip(-1) if flipped else expected)
    assert seen == {False, True}


@pytest.mark.parametrize("on_device", [False, True])
def test_multiscale_differs_from_pillow_by_one_level_at_most(tmp_path, on_device):
    path = write_photographs(tmp_path)
    sizes = set()
    for image, target, picture in delivered(tmp_path, path, "multiscale", 0, resize_on_device=on_device):
        height, width = image.shape[-2:]
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        expected = tvf.to_dtype(tvf.pil_to_tensor(resized), torch.float32, scale=True)
        if mirrored(target, width, ratio=(width / picture.width, height / picture.height)):
            expected = expected.flip(-1)
        assert (image - expected).abs().max() <= 1.01 / 255
        sizes.add((height, width))
    assert len(sizes) > 2


def test_hflip_of_real_photographs_differs_by_nothing(tiny_coco):
    annotations = read_coco(tiny_coco / "annotations" / "instances_val2017.json")
    dataset = DetectionDataset(
        annotations,
        ImageFolder(tiny_coco / "val2017"),
        label_map_for(annotations),
        transforms=build_transforms("hflip", hflip_prob=1.0),
    )
    for index in range(0, len(dataset), 5):
        picture = Image.open(tiny_coco / "val2017" / annotations.file_name(index)).convert("RGB")
        assert (dataset[0, index].pixels == np.asarray(picture)[:, ::-1]).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_objects_whose_centre_is_cropped_away_are_dropped_mirrored_or_not(flip):
    """Against v2's own steps on a plain tensor with the same window."""
    boxes = np.array([[5, 5, 40, 60], [50, 20, 120, 90], [70, 60, 90, 80]], dtype=np.float32)
    dropped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        steps = v2.Compose([RandomIoUCrop(), v2.RandomHorizontalFlip(flip)])
        image = steps(LazyImage.of(np.zeros((96, 128, 3), dtype=np.uint8), boxes))
        torch.manual_seed(seed)
        canvas = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(96, 128))
        plain = v2.Compose([*steps.transforms, v2.SanitizeBoundingBoxes(labels_getter=None)])
        _, expected = plain(tv_tensors.Image(torch.zeros(3, 96, 128, dtype=torch.uint8)), canvas)
        assert np.allclose(image.canvas_boxes()[image.is_kept], expected.numpy())
        dropped += int((~image.is_kept).sum())
    assert dropped > 10
