"""The data path of torchvision's detection scripts, as the baseline of ``data.py``.

Written again, from their description, out of the pieces that they use: ``CocoDetection``, pycocotools, PIL,
``transforms.functional`` and ``transforms.v2``. Three anchors:

    A   default flags (PIL, no --use-v2): masks are decoded and transformed for every model
    A'  the same with masks only where the model needs them (torchvision's open pull request 9642)
    B   --use-v2, with PIL images or tensors

Where this is not the scripts' own work it is less work, never more.
"""

import random

import torch
from pycocotools import mask as mask_util
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.ops import box_iou
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2 import functional as tvf2

MEAN_COLOUR = (123, 117, 104)
SHORT_SIDES = tuple(range(480, 801, 32))


def zip_columns(batch):
    return tuple(zip(*batch))


class AnchorA(CocoDetection):
    """PIL images, targets made object by object, joint transforms of image and target, float images."""

    def __init__(self, images, annotations, preset, with_masks=True):
        super().__init__(str(images), str(annotations))
        self.steps, self.with_masks = V1_PRESETS[preset], with_masks

    def __getitem__(self, index):
        image, records = super().__getitem__(index)
        target = make_target(image, records, self.ids[index], self.with_masks)
        for step in self.steps:
            image, target = step(image, target)
        return tvf.convert_image_dtype(tvf.pil_to_tensor(image), torch.float32), target


def make_target(image, records, image_id, with_masks):
    width, height = image.size
    records = [record for record in records if record["iscrowd"] == 0]
    boxes = torch.as_tensor([record["bbox"] for record in records], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    target = {"boxes": boxes, "labels": torch.tensor([record["category_id"] for record in records])}
    if with_masks:
        masks = [decode_polygons(record["segmentation"], height, width) for record in records]
        target["masks"] = torch.stack(masks) if masks else torch.zeros((0, height, width), dtype=torch.uint8)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    target = {name: value[keep] for name, value in target.items()}
    area = torch.tensor([record["area"] for record in records])
    iscrowd = torch.tensor([record["iscrowd"] for record in records])
    return {**target, "image_id": image_id, "area": area, "iscrowd": iscrowd}


def decode_polygons(polygons, height, width):
    parts = mask_util.decode(mask_util.frPyObjects(polygons, height, width))
    return torch.as_tensor(parts, dtype=torch.uint8).any(dim=2).to(torch.uint8)


def flip(image, target):
    if torch.rand(1) < 0.5:
        width = image.size[0]
        image = tvf.hflip(image)
        target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
    return image, target


def resize(image, target, height, width):
    old_width, old_height = image.size
    image = tvf.resize(image, [height, width], interpolation=InterpolationMode.BILINEAR)
    target["boxes"] = target["boxes"] * torch.tensor([width / old_width, height / old_height] * 2)
    if "masks" in target:
        target["masks"] = tvf.resize(target["masks"], [height, width], interpolation=InterpolationMode.NEAREST)
    return image, target


def shortest_side(image, target):
    width, height = image.size
    ratio = min(random.choice(SHORT_SIDES) / min(height, width), 1333 / max(height, width))
    return resize(image, target, int(height * ratio), int(width * ratio))


def scale_jitter(image, target):
    width, height = image.size
    ratio = float(torch.empty(1).uniform_(0.1, 2.0)) * min(1024 / height, 1024 / width)
    return resize(image, target, int(height * ratio), int(width * ratio))


def crop_and_pad(image, target):
    width, height = image.size
    new_height, new_width = min(height, 1024), min(width, 1024)
    if (new_height, new_width) != (height, width):
        r = float(torch.rand(1))
        top, left = int((height - new_height) * r), int((width - new_width) * r)
        image = tvf.crop(image, top, left, new_height, new_width)
        boxes = target["boxes"] - torch.tensor([left, top, left, top])
        boxes[:, 0::2].clamp_(min=0, max=new_width)
        boxes[:, 1::2].clamp_(min=0, max=new_height)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        target["boxes"], target["labels"] = boxes[keep], target["labels"][keep]
        if "masks" in target:
            target["masks"] = tvf.crop(target["masks"][keep], top, left, new_height, new_width)
    right, bottom = 1024 - new_width, 1024 - new_height
    if right or bottom:
        image = tvf.pad(image, [0, 0, right, bottom], fill=MEAN_COLOUR)
        if "masks" in target:
            target["masks"] = tvf.pad(target["masks"], [0, 0, right, bottom])
    return image, target


def distort_colours(image, target):
    draws = torch.rand(7) < 0.5
    if draws[0]:
        image = tvf.adjust_brightness(image, random.uniform(0.875, 1.125))
    if draws[1] and draws[2]:
        image = tvf.adjust_contrast(image, random.uniform(0.5, 1.5))
    if draws[3]:
        image = tvf.adjust_saturation(image, random.uniform(0.5, 1.5))
    if draws[4]:
        image = tvf.adjust_hue(image, random.uniform(-0.05, 0.05))
    if draws[5] and not draws[1]:
        image = tvf.adjust_contrast(image, random.uniform(0.5, 1.5))
    if draws[6]:
        image = tvf.to_pil_image(tvf.pil_to_tensor(image)[torch.randperm(3)])
    return image, target


def zoom_out(image, target):
    if torch.rand(1) < 0.5:
        return image, target
    width, height = image.size
    side, x, y = random.uniform(1, 4), random.random(), random.random()
    new_width, new_height = int(width * side), int(height * side)
    left, top = int((new_width - width) * x), int((new_height - height) * y)
    image = tvf.pad(image, [left, top, new_width - width - left, new_height - height - top], fill=MEAN_COLOUR)
    target["boxes"] = target["boxes"] + torch.tensor([left, top, left, top])
    return image, target


def iou_crop(image, target):
    width, height = image.size
    boxes = target["boxes"]
    while True:
        overlap = random.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
        if overlap >= 1.0:
            return image, target
        for _ in range(40):
            r = torch.rand(2)
            new_width, new_height = int(width * (0.3 + 0.7 * r[0])), int(height * (0.3 + 0.7 * r[1]))
            if not 0.5 <= new_width / new_height <= 2.0:
                continue
            r = torch.rand(2)
            left, top = int((width - new_width) * r[0]), int((height - new_height) * r[1])
            right, bottom = left + new_width, top + new_height
            if left == right or top == bottom:
                continue
            x, y = 0.5 * (boxes[:, 0] + boxes[:, 2]), 0.5 * (boxes[:, 1] + boxes[:, 3])
            inside = (left < x) & (x < right) & (top < y) & (y < bottom)
            if not inside.any():
                continue
            kept = boxes[inside]
            if box_iou(kept, torch.tensor([[left, top, right, bottom]], dtype=kept.dtype)).max() < overlap:
                continue
            kept = kept - torch.tensor([left, top, left, top])
            kept[:, 0::2].clamp_(min=0, max=new_width)
            kept[:, 1::2].clamp_(min=0, max=new_height)
            target["boxes"], target["labels"] = kept, target["labels"][inside]
            return tvf.crop(image, top, left, new_height, new_width), target


V1_PRESETS = {
    "hflip": (flip,),
    "multiscale": (shortest_side, flip),
    "lsj": (scale_jitter, crop_and_pad, flip),
    "ssd": (distort_colours, zoom_out, iou_crop, flip),
    "ssdlite": (iou_crop, flip),
}


class CropAndPad(v2.Transform):
    """The window of lsj for v2. The scripts' own step crashes here: it returns boxes that are no tv_tensors."""

    def __init__(self, side, fill):
        super().__init__()
        self.side, self.fill = side, {tv_tensors.Mask: 0, tv_tensors.BoundingBoxes: 0}
        self.image_fill = fill

    def make_params(self, flat_inputs):
        height, width = v2._utils.query_size(flat_inputs)
        new_height, new_width = min(height, self.side), min(width, self.side)
        r = float(torch.rand(1))
        top, left = int((height - new_height) * r), int((width - new_width) * r)
        return {"window": (top, left, new_height, new_width)}

    def transform(self, inpt, params):
        top, left, height, width = params["window"]
        cut = self._call_kernel(tvf2.crop, inpt, top, left, height, width)
        padding = [0, 0, self.side - width, self.side - height]
        return self._call_kernel(tvf2.pad, cut, padding, fill=self.fill.get(type(inpt), self.image_fill))


def v2_steps(preset):
    fill = {tv_tensors.Mask: 0, "others": list(MEAN_COLOUR)}
    return {
        "hflip": lambda: [v2.RandomHorizontalFlip(0.5)],
        "multiscale": lambda: [
            v2.RandomShortestSize(min_size=SHORT_SIDES, max_size=1333),
            v2.RandomHorizontalFlip(0.5),
        ],
        "lsj": lambda: [
            v2.ScaleJitter((1024, 1024), antialias=True),
            CropAndPad(1024, list(MEAN_COLOUR)),
            v2.RandomHorizontalFlip(0.5),
        ],
        "ssd": lambda: [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=fill),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(0.5),
        ],
        "ssdlite": lambda: [v2.RandomIoUCrop(), v2.RandomHorizontalFlip(0.5)],
    }[preset]()


def anchor_b(images, annotations, preset, with_masks=False, tensors=False):
    """--use-v2: torchvision's wrapped CocoDetection with v2's own transforms, on PIL images or tensors."""
    steps = v2_steps(preset)
    to_tensor = v2.ToImage() if tensors else v2.PILToTensor()
    steps = [to_tensor, *steps] if tensors else [*steps, to_tensor]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.ConvertBoundingBoxFormat("XYXY"), v2.SanitizeBoundingBoxes()]
    dataset = CocoDetection(str(images), str(annotations), transforms=v2.Compose([*steps, v2.ToPureTensor()]))
    keys = ["boxes", "labels", "image_id"] + ["masks"] * with_masks
    return wrap_dataset_for_transforms_v2(dataset, target_keys=keys)
