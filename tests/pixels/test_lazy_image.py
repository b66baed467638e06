"""What a LazyImage notes down and carries out at the end equals what torchvision does step by step."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from loading.samples import DetectionDataset, LabelMap
from loading.splits import load_shapes_split
from pixels.finish import finish_masks, finish_pictures
from pixels.geometry import View
from pixels.lazy_image import LazyImage, render
from pixels.masks import block_from_mask, paste_blocks
from presets import build_transforms
from transforms import FixedSizeCrop, RandomIoUCrop


def photo(height=96, width=128, seed=0):
    """A smooth picture with some texture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def run(transform, pixels, boxes=None, seed=0):
    boxes = torch.tensor([[10.0, 10, 60, 50]]) if boxes is None else boxes
    torch.manual_seed(seed)
    canvas = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=pixels.shape[:2])
    return transform(LazyImage.of(pixels), canvas)


def chw(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def test_a_flip_differs_by_nothing():
    image, _ = run(v2.RandomHorizontalFlip(1.0), photo())
    assert (render(image, image.shown.place()) == photo()[:, ::-1]).all()


def test_flipping_twice_is_the_identity():
    image, _ = run(v2.Compose([v2.RandomHorizontalFlip(1.0)] * 2), photo())
    assert image.shown == View.of(96, 128)


@pytest.mark.parametrize("size", [(48, 64), (200, 300), (97, 31)])
def test_a_resize_differs_from_pillow_by_one_level_at_most(size):
    image, _ = run(v2.Resize(list(size)), photo())
    pixels = render(image, image.shown.place()).astype(int)
    pillow = np.asarray(Image.fromarray(photo()).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pixels - pillow).max() <= 1
    assert (pixels != pillow).mean() < 0.02


def test_a_resize_without_antialias_is_the_models_own_up_to_rounding():
    image, _ = run(v2.Resize([50, 50], antialias=False), photo())
    pixels = render(image, image.shown.place()).astype(float)
    exact = torch.nn.functional.interpolate(chw(photo())[None].float(), size=(50, 50), mode="bilinear")[0]
    assert np.abs(pixels - exact.permute(1, 2, 0).numpy()).max() <= 1.0


def test_crop_and_pad_differ_by_nothing():
    steps = v2.Compose([v2.Pad([7, 3, 11, 5], fill=[9, 8, 7]), FixedSizeCrop(90, 120), v2.RandomHorizontalFlip(1.0)])
    for seed in range(5):
        image, boxes = run(steps, photo(), seed=seed)
        torch.manual_seed(seed)
        canvas = tv_tensors.BoundingBoxes([[10.0, 10, 60, 50]], format="XYXY", canvas_size=(96, 128))
        expected, _ = steps(tv_tensors.Image(chw(photo())), canvas)
        assert (render(image, image.shown.place()) == expected.permute(1, 2, 0).numpy()).all()
        moved = image.shown.place().move_boxes(np.array([[10.0, 10, 60, 50]], dtype=np.float32))
        assert np.allclose(moved, boxes.numpy())


def test_boxes_follow_any_order_of_operations():
    """Crop, pad, flip and resize in any order move boxes as torchvision's own kernels do."""
    steps = [
        v2.RandomHorizontalFlip(1.0),
        v2.Pad([8, 4, 12, 16], fill=[1, 2, 3]),
        v2.Resize([120, 200]),
        FixedSizeCrop(100, 160),
    ]
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(4)
        image, boxes = run(v2.Compose([steps[i] for i in order]), photo())
        moved = image.shown.place().move_boxes(np.array([[10.0, 10, 60, 50]], dtype=np.float32))
        assert np.abs(moved - boxes.numpy()).max() <= 1.0, order  # half a source pixel is rounded


def test_large_scale_jitter_moves_no_edge_by_more_than_half_a_source_pixel():
    """Against Pillow's resize of the whole picture and a crop afterwards, on a picture that codes its coordinates."""
    height, width = 96, 128
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[:, :, 0] = np.arange(width)
    ramp[:, :, 1] = np.arange(height)[:, None]
    transform = v2.Compose([v2.ScaleJitter((160, 160), (0.5, 2.0)), FixedSizeCrop(160, 160)])
    checked = 0
    for seed in range(30):
        image, _ = run(transform, ramp, seed=seed)
        view = image.shown
        got = render(image, view.place()).astype(float)
        whole = Image.fromarray(ramp).resize(
            (round(width * view.scale_x), round(height * view.scale_y)), Image.Resampling.BILINEAR
        )
        left, top = round(-view.offset_x), round(-view.offset_y)
        expected = np.asarray(whole.crop((left, top, left + view.width, top + view.height))).astype(float)
        inner = (slice(3, -3), slice(3, -3))
        assert np.abs(got - expected)[inner][:, :, :2].max() <= 1.6  # half a source pixel and two roundings
        checked += view.width < whole.width
    assert checked >= 5  # some were really cropped


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (210, 333), (96, 128)])
def test_masks_resized_inside_their_blocks_equal_the_resized_canvas(size, flip):
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 96, 128), dtype=np.uint8)
    for mask in masks:
        y, x = rng.integers(0, 80), rng.integers(0, 100)
        mask[y : y + 16, x : x + 28] = rng.random((16, 28))[: 96 - y, : 128 - x] < 0.7
    steps = v2.Compose([v2.Resize(list(size)), v2.RandomHorizontalFlip(float(flip))])
    image, _ = run(steps, photo())
    placement = image.shown.place()
    blocks = [placement.crop_block(block_from_mask(mask)) for mask in masks]
    small = paste_blocks([placement.resize_block(block) for block in blocks], *size)
    expected = finish_masks(torch.from_numpy(paste_blocks(blocks, *placement.source_size)), placement)
    assert (small == expected.numpy()).all()
    nearest = torch.nn.functional.interpolate(torch.from_numpy(masks)[:, None], size=size, mode="nearest")[:, 0]
    assert (small == (nearest.flip(-1) if flip else nearest).numpy()).all()


def test_finishing_on_the_device_equals_rendering_in_the_worker():
    transform = v2.Compose([v2.ScaleJitter((160, 160), (0.3, 2.0)), FixedSizeCrop(160, 160), v2.RandomHorizontalFlip()])
    for seed in range(10):
        image, _ = run(transform, photo(), seed=seed)
        placement = image.shown.place()
        in_worker = render(image, placement).astype(np.float32) / 255
        part = chw(render(image, placement, resize=False)).float() / 255
        on_device = finish_pictures([part], [placement])[0].permute(1, 2, 0).numpy()
        assert np.abs(in_worker - on_device).max() <= 1.01 / 255


def test_recolouring_on_the_device_equals_rendering_in_the_worker():
    """The resize is rounded to whole levels in both places; one level there may become eight."""
    boxes = np.array([[10, 10, 90, 80]], dtype=np.float32)
    transform = build_transforms("ssd", fixed_size=(60, 60))
    recoloured = 0
    for seed in range(20):
        torch.manual_seed(seed)
        image = transform(LazyImage.of(photo(), boxes))
        placement = image.shown.place()
        in_worker = render(image, placement).astype(np.float32)
        part = chw(render(image, placement, resize=False)).float() / 255
        on_device = finish_pictures([part], [placement])[0].permute(1, 2, 0).numpy() * 255
        difference = np.abs(in_worker - on_device)
        assert difference.max() <= 8 and difference.mean() <= 0.5
        assert np.abs(on_device - on_device.round()).max() < 1e-3  # whole levels, as uint8 pictures have
        recoloured += bool(placement.colour_ops)
    assert recoloured >= 10


def test_no_strip_of_the_fill_colour_stays_where_an_enlarged_picture_is_cropped():
    transform = v2.Compose([v2.ScaleJitter((160, 160), (1.2, 2.0)), FixedSizeCrop(160, 160), v2.RandomHorizontalFlip()])
    for seed in range(30):
        image, _ = run(transform, photo(), seed=seed)
        assert image.shown.place().fills_canvas


# Every transform of v2 that changes pictures: those that work, and those that say so.
NOTED = [
    v2.Identity(), v2.RandomHorizontalFlip(1.0), v2.Resize((40, 50)), v2.Resize(40), v2.Resize(None, max_size=70),
    v2.Resize(60, max_size=70), v2.RandomResize(20, 30), v2.RandomShortestSize([30]), v2.ScaleJitter((40, 40)),
    v2.CenterCrop(21), v2.CenterCrop((200, 30)), v2.RandomCrop(20), v2.RandomResizedCrop((20, 31)), v2.Pad(3),
    v2.Pad([3, 5], fill=(1, 2, 3)), v2.Pad([1, 2, 3, 4], fill=7), v2.RandomZoomOut(p=1.0), v2.RandomIoUCrop(),
    v2.ColorJitter(0.1, 0.1, 0.1, 0.1), v2.RandomPhotometricDistort(), v2.RandomChannelPermutation(), v2.RGB(),
    v2.ToImage(), v2.ClampBoundingBoxes(), v2.ClampKeyPoints(), v2.SanitizeBoundingBoxes(),
    v2.ConvertBoundingBoxFormat("XYWH"), v2.SetClampingMode("soft"),
]  # fmt: skip
OF_ONE_PIXEL = [
    v2.RandomInvert(1.0), v2.RandomSolarize(100, 1.0), v2.RandomPosterize(3, 1.0), v2.Grayscale(3),
    v2.RandomGrayscale(1.0), v2.Lambda(lambda x: tvf.adjust_gamma(x, 1.5)),
]  # fmt: skip
OF_MANY_PIXELS = [
    v2.RandomAutocontrast(1.0), v2.RandomEqualize(1.0), v2.RandomAdjustSharpness(2, 1.0), v2.GaussianBlur(5),
    v2.GaussianNoise(), v2.JPEG(50),
]  # fmt: skip
REFUSED = [
    (v2.RandomVerticalFlip(1.0), "vertical_flip"), (v2.RandomRotation(30), "rotate"), (v2.RandomAffine(30), "affine"),
    (v2.RandomPerspective(p=1.0), "perspective"), (v2.ElasticTransform(), "elastic"), (v2.RandomErasing(1.0), "erase"),
    (v2.Normalize([0.5] * 3, [0.5] * 3), "normalize"), (v2.ToDtype(torch.float32, scale=True), "to_dtype"),
    (v2.ConvertImageDtype(torch.float32), "to_dtype"), (v2.FiveCrop(20), "five_crop"), (v2.TenCrop(20), "ten_crop"),
    (v2.Pad(3, padding_mode="reflect"), "pad with padding_mode 'reflect'"), (v2.ToPILImage(), "torch's permute"),
    (v2.Resize((9, 9), interpolation=v2.InterpolationMode.NEAREST), "resize with .*NEAREST"),
    (v2.Grayscale(1), "rgb_to_grayscale to"), (v2.Lambda(lambda x: torch.flip(x, (0,))), "torch's flip"),
    (v2.Compose([v2.Resize((40, 40)), v2.GaussianBlur(3)]), "gaussian_blur after a crop, pad or resize"),
    (v2.AugMix(), "torch's reshape"),
]  # fmt: skip
# They draw one of the operations above at random; or change no pictures, or batches; or leave the tensor's class behind.
COMPOSED = {"AutoAugment", "RandAugment", "TrivialAugmentWide"}
OTHERS = {
    "Transform",
    "SanitizeKeyPoints",
    "CutMix",
    "MixUp",
    "UniformTemporalSubsample",
    "ConvertBoundingBoxFormat",
    "ToPureTensor",
}
OTHERS |= {"LinearTransformation", "PILToTensor", "ToTensor", "Compose", "RandomApply", "RandomChoice", "RandomOrder"}


def test_every_transform_of_v2_is_in_one_of_the_lists():
    tried = [*NOTED, *OF_ONE_PIXEL, *OF_MANY_PIXELS, *(transform for transform, _ in REFUSED)]
    known = {type(transform).__name__ for transform in tried} | COMPOSED | OTHERS
    names = {name for name, c in vars(v2).items() if isinstance(c, type) and issubclass(c, v2.Transform)}
    assert names <= known, names - known


def named(transform):
    return str(transform)[:40]


@pytest.mark.parametrize("transform", NOTED, ids=named)
def test_what_is_noted_down_has_the_size_and_boxes_of_torchvisions(transform):
    boxes = torch.tensor([[10.0, 10, 60, 50]])
    canvas = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(96, 128))
    torch.manual_seed(0)
    image, entries = transform(LazyImage.of(photo(), boxes.numpy()), {"boxes": canvas, "labels": torch.tensor([1])})
    torch.manual_seed(0)
    plain, expected = transform(tv_tensors.Image(chw(photo())), {"boxes": canvas, "labels": torch.tensor([1])})
    placement = image.shown.place()
    got = render(image, placement)
    assert got.shape == (*plain.shape[1:], 3)
    theirs = tvf.convert_bounding_box_format(expected["boxes"], new_format="XYXY")
    if len(theirs) and not isinstance(transform, v2.RandomIoUCrop):  # which leaves dropped boxes as zeros
        assert np.abs(placement.move_boxes(boxes.numpy()) - theirs.numpy()).max() < 0.51
        difference = np.abs(got.astype(int) - plain.permute(1, 2, 0).numpy().astype(int))
        assert difference.mean() <= 3


@pytest.mark.parametrize("transform", [*OF_ONE_PIXEL, *OF_MANY_PIXELS], ids=named)
def test_colour_operations_that_cannot_be_noted_down_equal_torchvisions(transform):
    pixels = photo() // 2 + 20  # room for more contrast
    torch.manual_seed(0)
    image = transform(LazyImage.of(pixels))
    torch.manual_seed(0)
    expected = transform(tv_tensors.Image(chw(pixels))).permute(1, 2, 0).numpy()
    assert (render(image, image.shown.place()) == expected).all()
    assert (expected != pixels).any()
    if isinstance(transform, v2.GaussianNoise):  # its noise depends on how the tensor lies in memory
        return
    # After a flip and a change of brightness that are only noted down.
    before = [v2.RandomHorizontalFlip(1.0), v2.Lambda(lambda x: tvf.adjust_brightness(x, 0.7))]
    torch.manual_seed(0)
    image = v2.Compose([*before, transform])(LazyImage.of(pixels))
    torch.manual_seed(0)
    expected = v2.Compose([before[1], transform])(tv_tensors.Image(chw(pixels))).flip(-1).permute(1, 2, 0).numpy()
    assert np.abs(render(image, image.shown.place()).astype(int) - expected).mean() <= 1  # brightness is rounded


@pytest.mark.parametrize("transform", OF_ONE_PIXEL, ids=named)
def test_colours_of_single_pixels_change_after_a_crop_too(transform):
    steps = [v2.CenterCrop((40, 50)), transform]
    image = v2.Compose(steps)(LazyImage.of(photo()))
    expected = v2.Compose(steps)(tv_tensors.Image(chw(photo()))).permute(1, 2, 0).numpy()
    assert (render(image, image.shown.place()) == expected).all()


@pytest.mark.parametrize(("transform", "name"), REFUSED, ids=[named(t) for t, _ in REFUSED])
def test_what_does_not_work_says_which_and_what_does(transform, name):
    with pytest.raises(TypeError, match=f"({name}).* does not work on a LazyImage.* use these: horizontal_flip, crop"):
        transform(LazyImage.of(photo()))


@pytest.mark.parametrize("name", sorted(COMPOSED))
def test_random_policies_work_or_name_the_operation(name):
    for seed in range(20):
        torch.manual_seed(seed)
        try:
            image = getattr(v2, name)()(LazyImage.of(photo()))
            assert render(image, image.shown.place()).shape == (96, 128, 3)
        except TypeError as error:
            assert "does not work on a LazyImage" in str(error)


def test_a_picture_that_is_no_longer_lazy_is_refused_with_its_class():
    split = load_shapes_split("train")
    dataset = DetectionDataset(
        split.annotations, split.images, LabelMap.contiguous(split.annotations.categories),
        transforms=v2.Compose([v2.ToPureTensor()]),
    )  # fmt: skip
    with pytest.raises(TypeError, match="turned a LazyImage into Tensor"):
        dataset[0]


@pytest.mark.parametrize("seed", range(20))
def test_colour_changes_are_torchvisions_within_a_bound(seed):
    """Stated bound against the whole picture step by step: 4 levels at most, one on average."""
    torch.manual_seed(seed)
    params = v2.RandomPhotometricDistort().make_params([chw(photo(seed=seed))])
    plain = v2.RandomPhotometricDistort().transform(chw(photo(seed=seed)), params)
    noted = v2.RandomPhotometricDistort().transform(LazyImage.of(photo(seed=seed)), params)
    got = render(noted, noted.shown.place()).astype(int)
    difference = np.abs(got - plain.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= 4
    assert difference.mean() <= 1.0


def test_hue_alone_equals_torchvision_up_to_rounding():
    for shift in (-0.05, 0.02, 0.05):
        noted = tvf.adjust_hue(LazyImage.of(photo()), shift)
        got = render(noted, noted.shown.place()).astype(int)
        plain = tvf.adjust_hue(chw(photo()), shift).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(got - plain).max() <= 1


def test_iou_crop_has_the_distribution_of_torchvisions():
    """Share of whole images, mean crop area and share of kept boxes over many draws, against v2's own class."""
    boxes = torch.tensor([[5.0, 5, 40, 60], [50, 20, 120, 90], [70, 60, 90, 80]])
    canvas = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(96, 128))

    def figures(transform, inputs, draws):
        whole, areas, kept = 0, [], []
        for _ in range(draws):
            params = transform.make_params(inputs)
            whole += not params
            if params:
                areas.append(params["height"] * params["width"] / (96 * 128))
                kept.append(float(params["is_within_crop_area"].float().mean()))
        return np.array([whole / draws, np.mean(areas), np.mean(kept)])

    torch.manual_seed(0)
    ours = figures(RandomIoUCrop(), [canvas], 3000)
    theirs = figures(v2.RandomIoUCrop(), [tv_tensors.Image(chw(photo())), canvas], 1500)
    assert np.abs(ours - theirs).max() < 0.04, (ours, theirs)


def test_iou_crop_keeps_the_boxes_whose_centre_it_holds():
    """Torchvision's rule. A box whose centre is outside goes, however much of it is still to be seen."""
    boxes = np.array([[5, 5, 40, 60], [50, 20, 120, 90], [70, 60, 90, 80], [0, 0, 128, 96]], dtype=np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    crop, dropped_in_sight = RandomIoUCrop(), 0
    for seed in range(60):
        torch.manual_seed(seed)
        image = crop(LazyImage.of(photo(), boxes))
        moved = image.shown.place().move_boxes(np.concatenate([centres, centres], axis=1))  # clipped to the crop
        limits = [image.shown.width, image.shown.height]
        inside = ((moved[:, :2] > 0) & (moved[:, :2] < limits)).all(axis=1)
        assert image.is_kept.tolist() == inside.tolist()
        seen = image.canvas_boxes()
        dropped_in_sight += int((~image.is_kept & (seen[:, 2:] - seen[:, :2] >= 1).all(axis=1)).sum())
    assert dropped_in_sight > 10


def test_iou_crop_leaves_images_without_boxes_whole():
    image, _ = run(RandomIoUCrop(), photo(), boxes=torch.zeros(0, 4))
    assert image.shown == View.of(96, 128)


PADDED = [7, 5, 9, 11]  # left, top, right, bottom


@pytest.mark.parametrize("window", [(0, 20, 5, 10), (30, 0, 8, 7), (101, 40, 11, 10), (50, 135, 4, 9), (0, 0, 5, 7)])
@pytest.mark.parametrize("factor", [1, 8])
def test_a_crop_beside_the_picture_is_the_fill_colour_without_objects(window, factor):
    """Above, left, below, right and at the corner, of the picture as it is and enlarged; what follows works on it."""

    def change(image):
        image = tvf.pad(tvf.resize(image, [96 * factor, 128 * factor]), [v * factor for v in PADDED], fill=[9, 8, 7])
        cropped = tvf.crop(image, *(v * factor for v in window))
        return tvf.pad(tvf.horizontal_flip(cropped), [1, 2, 3, 4], fill=[3, 2, 1])

    image = change(LazyImage.of(photo(), np.array([[0, 0, 128, 96]], dtype=np.float32)))
    assert (render(image, image.shown.place()) == change(chw(photo())).permute(1, 2, 0).numpy()).all()
    assert image.is_kept.tolist() == [False]


def test_a_crop_over_all_edges_is_black_there_as_torchvisions():
    image = tvf.crop(LazyImage.of(photo()), -3, -5, 110, 140)
    expected = tvf.crop(chw(photo()), -3, -5, 110, 140)
    assert (render(image, image.shown.place()) == expected.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("window", [(0, 0, 1, 2), (767, 1022, 1, 2), (402, 301, 2, 2), (407, 303, 1, 1)])
def test_a_crop_of_less_than_a_pixel_shows_the_pixel_it_lies_in(window):
    image = tvf.crop(tvf.resize(LazyImage.of(photo()), [768, 1024]), *window)
    place = image.shown.place()
    left, top = window[1] // 8, window[0] // 8
    assert place.source == (left, top, left + 1, top + 1) and place.fills_canvas
    assert (render(image, place) == photo()[top, left]).all()


def test_keypoints_leave_with_visibility_zero_and_swap_in_a_mirror():
    view = View.of(96, 128).crop(10, 20, 50, 60).flip()
    points = np.array([[[25.0, 15, 2], [79.5, 59.5, 1], [10, 15, 2], [30, 30, 0]]], dtype=np.float32)
    moved = view.place().move_keypoints(points, np.array([1, 0, 2, 3]))
    assert moved[0].tolist() == [[0, 49.5, 1], [60 - 1 - 5, 5, 2], [0, 0, 0], [0, 0, 0]]
