"""After any preset boxes enclose their masks and keypoints stay on the pixel they marked."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from annotations.findings import Findings
from annotations.labels import LabelMap
from annotations.record_checks import Rules
from coco_utils import annotations_from_records
from group_by_aspect_ratio import EvalBatchSampler, GroupedBatchSampler
from helpers.coded import CodedImages, coded_annotations, coded_dataset, without_colours
from helpers.drawn import draw_coco
from loading import collate
from loading.collate import collate_fn, unpack
from loading.copy_paste import CopyPaste, paste_objects
from loading.loaders import DeviceLoader
from loading.samples import DetectionDataset, Sample
from loading.splits import label_map_for
from pixels.finish import finish_masks
from pixels.geometry import Placement
from pixels.masks import MaskBlock, paste_blocks
from presets import PRESETS, build_transforms

CPU = torch.device("cpu")


def source_pixels_per_pixel(image):
    """Read off a coded image how many source pixels one of its pixels covers, on the coarser axis."""
    rows, columns = torch.nonzero(image[2] > 0.98, as_tuple=True)
    shown = image[:2, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] * 255
    x_step = float(shown[0].max() - shown[0].min()) / max(shown.shape[2] - 1, 1)
    y_step = float(shown[1].max() - shown[1].min()) / max(shown.shape[1] - 1, 1)
    return max(x_step, y_step)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("on_device", [False, True])
def test_boxes_masks_and_keypoints_stay_together(preset, on_device):
    dataset = coded_dataset(without_colours(preset, min_size=160, max_size=400), resize_on_device=on_device)
    seen_objects = seen_points = lost_points = 0
    for epoch in range(25):
        for index in range(len(dataset)):
            sample = dataset[epoch, index]
            (image,), (target,) = unpack(collate_fn([sample]), CPU)
            source = dataset.annotations.objects(index)
            boxes, masks, keypoints = target["boxes"], target["masks"], target["keypoints"]
            assert len(boxes) == len(masks) == len(keypoints) == len(target["labels"])
            assert masks.shape[-2:] == image.shape[-2:]
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert (boxes[:, 2] <= image.shape[-1]).all() and (boxes[:, 3] <= image.shape[-2]).all()
            for box, mask in zip(boxes, masks):
                ys, xs = torch.nonzero(mask, as_tuple=True)
                if not len(xs):
                    continue  # a diamond's corner can leave less than a pixel
                seen_objects += 1
                slack = 1.0  # the outline is rasterised, the box is not
                assert box[0] - slack <= xs.min() and xs.max() + 1 <= box[2] + slack
                assert box[1] - slack <= ys.min() and ys.max() + 1 <= box[3] + slack
            originals = dataset.annotations.keypoints[source]
            step = source_pixels_per_pixel(image)
            for points in keypoints:
                for x, y, v in points.tolist():
                    if v == 0:
                        assert (x, y) == (0, 0)
                        lost_points += 1
                        continue
                    seen_points += 1
                    red, green, blue = (image[:, int(y), int(x)] * 255).tolist()
                    assert blue > 250  # not on the fill colour
                    coded = np.abs(originals[:, :, :2] - [red, green]).max(axis=2).min()
                    assert coded <= 1.2 + 1.5 * step, (
                        preset,
                        epoch,
                        index,
                    )  # one of the source's points, within its pixel
    assert seen_objects > 100 and seen_points > 300
    assert lost_points > 0 or preset in ("hflip", "multiscale")


def test_a_mirrored_left_point_takes_the_right_points_place():
    dataset = coded_dataset(v2.Compose([v2.RandomHorizontalFlip(1.0)]))
    sample = dataset[0, 0]
    original = dataset.annotations.keypoints[dataset.annotations.objects(0)]
    width = int(dataset.annotations.widths[0])
    assert (sample.target["keypoints"][:, 0, 0] == width - 1 - original[:, 1, 0]).all()
    assert (sample.target["keypoints"][:, 2, 1] == original[:, 3, 1]).all()


def test_flipping_by_the_dataset_twice_is_the_identity():
    plain, twice = coded_dataset(None)[0, 1], coded_dataset(v2.Compose([v2.RandomHorizontalFlip(1.0)] * 2))[0, 1]
    assert (plain.pixels == twice.pixels).all()
    for name in ("boxes", "labels", "keypoints"):
        assert (plain.target[name] == twice.target[name]).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_tiny_objects_stay_where_a_picture_is_moved_or_mirrored_and_leave_with_a_shrink(flipped):
    """Of their sides the float32 coordinates of a large picture lose a little, at places that are no whole numbers."""
    rng, size = np.random.default_rng(0), 4000
    sides = np.concatenate([rng.uniform(0.2, 0.9, (1000, 2)), np.ones((1000, 2))])
    places = np.concatenate([rng.random((2000, 2)) * (size - 1), sides], axis=1)
    images = [{"id": 1, "file_name": "a", "height": size, "width": size}]
    objects = [{"image_id": 1, "category_id": 1, "bbox": box} for box in places.tolist()]
    annotations = annotations_from_records(images, objects, [{"id": 1, "name": "a"}], Rules("x", str, str), Findings())
    dataset = DetectionDataset(annotations, CodedImages(), LabelMap((1,), ("a",)), resize_on_device=True)
    flip = v2.RandomHorizontalFlip(float(flipped))
    for steps, kept in (([], 2000), ([v2.Pad(3)], 2000), ([v2.Resize(size - 100)], 0)):
        dataset.transforms = v2.Compose([*steps, flip])
        assert len(dataset[0].target["boxes"]) == kept


def test_without_augmentation_masks_equal_the_polygons_of_pycocotools(tmp_path):
    from pycocotools.coco import COCO

    from coco_utils import read_coco
    from loading.samples import ImageFolder

    root = draw_coco(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    annotations = read_coco(path)
    dataset = DetectionDataset(
        annotations, ImageFolder(root / "train2017"), label_map_for(annotations), needs_masks=True
    )
    coco = COCO(str(path))
    for index in range(len(dataset)):
        sample = dataset[index]
        image_id = sample.target["image_id"]
        expected = [a for a in coco.imgToAnns[image_id] if not a["iscrowd"]]
        masks = paste_blocks(sample.blocks, *sample.pixels.shape[:2])
        assert len(masks) == len(expected)
        for mask, box, record in zip(masks, sample.target["boxes"], expected):
            assert (mask == coco.annToMask(record)).all()
            x, y, w, h = record["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]


def test_crowds_are_not_trained_on_and_a_crowd_only_image_is_an_empty_target():
    rules = Rules("x", str, str)
    images = [{"id": 1, "file_name": "a", "height": 50, "width": 50}]
    objects = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20], "iscrowd": 1, "keypoints": [3, 3, 2] * 4}]
    annotations = annotations_from_records(images, objects, [{"id": 1, "name": "a"}], rules, Findings())
    dataset = DetectionDataset(
        annotations, CodedImages(), LabelMap((1,), ("a",)), needs_masks=True, needs_keypoints=True
    )
    _, (target,) = unpack(collate_fn([dataset[0]]), CPU)
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, 50, 50)
    assert target["keypoints"].shape == (0, 4, 3)


def test_a_box_dataset_decodes_no_mask(monkeypatch):
    from loading import samples

    monkeypatch.setattr(samples, "mask_block", lambda *_: pytest.fail("a mask was decoded"))
    annotations = coded_annotations()
    dataset = DetectionDataset(annotations, CodedImages(), LabelMap((1,), ("thing",)))
    assert dataset[0].blocks is None and "keypoints" not in dataset[0].target


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_depends_on_seed_epoch_and_index_only(preset, drawn_coco):
    from coco_utils import read_coco
    from loading.samples import ImageFolder

    annotations = read_coco(drawn_coco / "annotations" / "instances_train2017.json")

    def loaded(workers, rank=0, world_size=1, seed=1, epoch=0):
        dataset = DetectionDataset(
            annotations,
            ImageFolder(drawn_coco / "train2017"),
            label_map_for(annotations),
            transforms=build_transforms(preset, min_size=64, max_size=100),
            needs_masks=True,
            seed=seed,
        )
        sampler = GroupedBatchSampler(
            dataset.heights, dataset.widths, group_factor=3, batch_size=1, seed=seed, rank=rank, world_size=world_size
        )
        sampler.set_epoch(epoch)
        torch.manual_seed(workers)  # the main process's generator must not matter
        found = {}
        for images, targets in DeviceLoader(dataset, sampler, workers=workers, device=CPU):
            for image, target in zip(images, targets):
                found[target["image_id"]] = (image, target)
        return found

    alone = loaded(0)
    for other in (loaded(2), {**loaded(0, 0, 2), **loaded(1, 1, 2)}):
        assert other.keys() == alone.keys()
        for image_id, (image, target) in alone.items():
            assert torch.equal(other[image_id][0], image)
            assert torch.equal(other[image_id][1]["boxes"], target["boxes"])
            assert torch.equal(other[image_id][1]["masks"], target["masks"])
    for different in (loaded(0, seed=2), loaded(0, epoch=1)):
        assert any(not torch.equal(different[k][0], alone[k][0]) for k in alone)


def test_packing_a_batch_loses_nothing():
    dataset = coded_dataset(without_colours("ssdlite"))
    samples = [dataset[5, i] for i in range(3)]
    images, targets = unpack(collate_fn(samples), CPU)
    for image, target, sample in zip(images, targets, samples):
        expected = torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1) * torch.tensor(1 / 255)
        assert torch.equal(image, expected)
        assert image.dtype == torch.float32
        assert (target["masks"].numpy() == paste_blocks(sample.blocks, *sample.pixels.shape[:2])).all()
        for name in ("boxes", "labels", "keypoints"):
            assert (target[name].numpy() == sample.target[name]).all()


class TensorSizes(TorchDispatchMode):
    """Notes the bytes of every tensor that an operation makes, but for pixels."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype != torch.float32:
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("num_objects", [0, 1, 7, 40])
def test_masks_that_the_device_resizes_take_bounded_memory_and_are_the_same(num_objects, flipped, monkeypatch):
    rng = np.random.default_rng(0)
    height, width = 300, 400
    placement = Placement((0, 0, width, height), (3, 5, 83, 65), 70, 90, flipped, (0, 0, 0), True)
    blocks = []
    for _ in range(num_objects):
        left, top = int(rng.integers(0, width - 30)), int(rng.integers(0, height - 20))
        blocks.append(MaskBlock(left, top, rng.integers(0, 2, (20, 30), dtype=np.uint8)))
    pixels = np.zeros((height, width, 3), np.uint8)
    batch = collate_fn([Sample(pixels, placement, {"image_id": n}, blocks) for n in range(2)])
    expected = finish_masks(torch.from_numpy(paste_blocks(blocks, height, width)), placement)
    for at_once in (40, 7, 3, 0):
        monkeypatch.setattr(collate, "MAX_MASK_BYTES", at_once * height * width)
        with TensorSizes() as sizes:
            _, targets = unpack(batch, CPU)
        assert all(torch.equal(target["masks"], expected) for target in targets)
        own = max(batch.buffer.numel(), expected.numel())  # of batch and result
        assert sizes.largest <= max(own, at_once * height * width)


def test_the_loader_ends_and_starts_again_with_persistent_workers(drawn_coco):
    from coco_utils import read_coco
    from loading.samples import ImageFolder

    annotations = read_coco(drawn_coco / "annotations" / "instances_val2017.json")
    dataset = DetectionDataset(
        annotations, ImageFolder(drawn_coco / "val2017"), label_map_for(annotations), with_targets=False
    )
    loader = DeviceLoader(dataset, EvalBatchSampler(len(dataset), batch_size=4), workers=2, device=CPU)
    for _ in range(2):
        ids = [target["image_id"] for _, targets in loader for target in targets]
        assert ids == annotations.image_ids.tolist()


def two_samples():
    dataset = coded_dataset(None)
    onto, source = dataset[0, 0], dataset[0, 1]
    for sample in (onto, source):
        del sample.target["keypoints"]
    return onto, source


def test_copy_paste_keeps_boxes_masks_and_labels_together():
    onto, source = two_samples()
    before = onto.pixels.copy()
    for seed in range(20):
        mixed = paste_objects(onto, source, np.random.default_rng(seed))
        masks = paste_blocks(mixed.blocks, *mixed.pixels.shape[:2])
        assert len(masks) == len(mixed.target["boxes"]) == len(mixed.target["labels"]) > 0
        for mask, box in zip(masks, mixed.target["boxes"]):
            ys, xs = np.nonzero(mask)
            assert box[0] - 1 <= xs.min() and xs.max() + 1 <= box[2] + 1
            assert box[1] - 1 <= ys.min() and ys.max() + 1 <= box[3] + 1
    assert (onto.pixels == before).all()


def test_copy_paste_blends_softly_and_keeps_uncovered_boxes():
    onto, source = two_samples()
    source.pixels = np.zeros_like(source.pixels)
    onto.pixels = np.full_like(onto.pixels, 200)
    mixed = paste_objects(onto, source, np.random.default_rng(0))
    assert {0, 200} < set(np.unique(mixed.pixels)) and len(np.unique(mixed.pixels)) > 20  # a hard edge has two values
    original = onto.target["boxes"].tolist()
    kept = [
        box
        for seed in range(20)
        for box in paste_objects(onto, source, np.random.default_rng(seed)).target["boxes"].tolist()
        if box in original
    ]
    assert kept  # boxes of objects that nothing covers are not redrawn


def test_copy_paste_is_a_function_of_seed_and_batch():
    onto, source = two_samples()
    a, b = CopyPaste(7)([onto, source]), CopyPaste(7)([onto, source])
    assert torch.equal(a.buffer, b.buffer)
    assert not torch.equal(a.buffer, CopyPaste(8)([onto, source]).buffer)


def test_copy_paste_from_an_empty_image_changes_nothing():
    onto, source = two_samples()
    source.blocks, source.target["boxes"] = [], np.zeros((0, 4), np.float32)
    assert paste_objects(onto, source, np.random.default_rng(0)) is onto


def test_objects_of_unknown_categories_have_no_label():
    """Validation losses over files with classes that the model does not know."""
    annotations = coded_annotations()
    annotations.category_ids[::2] = 7
    strange = dataclasses.replace(annotations, categories=((1, "thing"), (7, "other")))
    dataset = DetectionDataset(strange, CodedImages(), LabelMap((1, 9), ("thing", "last")), needs_masks=True)
    sample = dataset[0]
    assert 0 < len(sample.target["boxes"]) == len(sample.blocks) < 5
    assert (sample.target["labels"] == 1).all()
    with pytest.raises(AssertionError):
        LabelMap((1, 9), ("thing", "last")).labels_of(np.array([7]))


def test_pictures_that_shrink_very_much_are_resized_in_the_worker():
    transforms = v2.Compose([v2.Resize([3, 4])])
    sample = coded_dataset(transforms, resize_on_device=True)[0]
    assert sample.placement is None and sample.pixels.shape == (3, 4, 3)
    assert coded_dataset(v2.Compose([v2.Resize([30, 40])]), resize_on_device=True)[0].placement is not None
