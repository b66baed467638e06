"""Small training batches: pictures of several sizes with objects, drawn from a seed."""

import torch


def objects_in(height, width, count, rng, *, num_labels=3):
    """Return a target of ``count`` boxes inside a picture, of all sizes from 4 pixels on."""
    corners = torch.rand(count, 2, 2, generator=rng).sort(dim=1).values * torch.tensor([width - 4.0, height - 4.0])
    boxes = corners.reshape(count, 4)
    boxes[:, 2:] += 4
    return {"boxes": boxes, "labels": torch.randint(1, num_labels + 1, (count,), generator=rng)}


def add_masks(target, height, width, rng):
    """Give each object of a target a mask of noise within its box."""
    masks = torch.zeros(len(target["boxes"]), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, target["boxes"].long().tolist()):
        inside = mask[top : bottom + 1, left : right + 1]
        inside.copy_(torch.randint(0, 2, inside.shape, generator=rng))
    target["masks"] = masks


def add_keypoints(target, rng, *, num_keypoints=3):
    """Give each object of a target keypoints in its box, some of them invisible."""
    boxes = target["boxes"][:, None]
    places = torch.rand(len(boxes), num_keypoints, 2, generator=rng)
    visible = (torch.rand(len(boxes), num_keypoints, 1, generator=rng) < 0.8).float() * 2
    target["keypoints"] = torch.cat([boxes[..., :2] + places * (boxes[..., 2:] - boxes[..., :2]), visible], dim=2)


def make_batch(sizes, counts, *, seed=0, task="box", num_labels=3):
    """Return pictures of the given (height, width) and as many objects in each as ``counts`` says."""
    rng = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=rng) for size in sizes]
    targets = []
    for size, count in zip(sizes, counts, strict=True):
        target = objects_in(*size, count, rng, num_labels=num_labels)
        if task == "mask":
            add_masks(target, *size, rng)
        if task == "keypoint":
            add_keypoints(target, rng)
        targets.append(target)
    return images, targets
