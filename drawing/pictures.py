"""Objects drawn into pictures, and sheets of pictures: boxes, captions, masks, keypoints with their skeleton.

Pictures go in and out as uint8 [3, H, W]. Where the objects come from, ground truth or detections, is the caller's
affair.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from annotations.skeleton import Skeleton
from files import write_aside
from pixels.masks import MaskBlock

# Okabe and Ito's colours, which people with any kind of colour vision tell apart (https://jfly.uni-koeln.de/color/);
# black is left out, and neighbours in the list are made to differ in brightness too.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (0, 114, 178),
    (204, 121, 167),
    (0, 158, 115),
)

_DARK, _LIGHT = (20, 20, 20), (255, 255, 255)
_MASK_ALPHA = 0.45

NO_SKELETON = Skeleton()


@dataclass(frozen=True)
class Drawn:
    """What is to be drawn into one picture; N objects.

    Attributes:
        boxes: float [N, 4], absolute xyxy.
        captions: N texts; an empty one is not drawn.
        colours: int [N], any numbers, for instance labels: equal ones get equal colours of `PALETTE`.
        masks: N mask blocks, or None.
        keypoints: float [N, K, 3] or None; v is 0 for not drawn, 1 for a hollow point, 2 for a filled one.
    """

    boxes: np.ndarray
    captions: Sequence[str]
    colours: np.ndarray
    masks: Sequence[MaskBlock] | None = None
    keypoints: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.captions)


@dataclass(frozen=True, eq=False)
class _Pens:
    """Sizes in pixels of what is drawn into one picture, and where text stands already.

    Attributes:
        line: Width of outlines.
        text: Height of letters.
        point: Radius of keypoints.
        taken: bool [H, W].
    """

    line: int
    text: int
    point: int
    taken: np.ndarray


def _pens_for(height: int, width: int, shown_at: int | None) -> _Pens:
    """Return sizes for a picture that is shown with ``shown_at`` pixels on its long side; None for as it is."""
    shrunk = 1.0 if shown_at is None else max(max(height, width) / shown_at, 1.0)
    shown = (height * width) ** 0.5 / shrunk
    line = max(shown / 330, 1.0) * shrunk
    text, point = max(shown / 48, 11.0) * shrunk, max(shown / 220, 2.0) * shrunk
    return _Pens(round(line), round(text), round(point), np.zeros((height, width), dtype=bool))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans; without matplotlib Pillow's own font, which has no letter beyond ASCII."""
    try:
        import matplotlib  # here: commands that draw nothing do not wait for it
    except ImportError:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # with a size it is
        return font
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def draw_objects(
    image: Tensor,
    objects: Drawn,
    skeleton: Skeleton = NO_SKELETON,
    *,
    keypoint_names: bool = False,
    shown_at: int | None = None,
) -> Tensor:
    """Draw ``objects`` into a copy of ``image``: masks, then boxes, then keypoints, captions on top.

    Args:
        image: uint8 [3, H, W].
        objects: What to draw; earlier objects get the better places for their captions, and a caption that could only
            stand on others is left out.
        skeleton: Links between keypoints, and their names.
        keypoint_names: Write the names beside the keypoints of objects that are large enough for it.
        shown_at: Long side in pixels that the picture will be shrunk to, in a sheet for instance: lines and
            text are made larger accordingly. None leaves it at its size.

    Returns:
        uint8 [3, H, W].
    """
    height, width = image.shape[-2:]
    pens = _pens_for(height, width, shown_at)
    picture = image.cpu().clone()
    colours = [PALETTE[int(c) % len(PALETTE)] for c in objects.colours]
    for block, colour in zip(objects.masks or (), colours):
        _draw_mask(picture, block, colour)
    boxes = np.asarray(objects.boxes, dtype=np.float64).reshape(-1, 4)
    if len(boxes):
        picture = draw_bounding_boxes(picture, _whole_boxes(boxes, height, width), colors=colours, width=pens.line)
    canvas = to_pil_image(picture)
    draw = ImageDraw.Draw(canvas)
    if objects.keypoints is not None:
        for points, colour in zip(np.asarray(objects.keypoints), colours):
            _draw_skeleton(draw, points, skeleton, colour, pens)
        if keypoint_names and skeleton.names:
            for points in np.asarray(objects.keypoints):
                if _has_room_for_names(points, pens):
                    _name_points(draw, points, skeleton.names, pens)
    for box, caption, colour in zip(boxes.tolist(), objects.captions, colours):
        if caption:
            _draw_caption(draw, box, caption, colour, pens)
    return pil_to_tensor(canvas)


def _whole_boxes(boxes: np.ndarray, height: int, width: int) -> Tensor:
    """Return boxes in whole pixels whose outlines lie inside the picture, int64 [N, 4]."""
    limits = [width - 1, height - 1, width - 1, height - 1]
    return torch.from_numpy(np.clip(boxes, 0, limits).round().astype(np.int64))


def _draw_mask(picture: Tensor, block: MaskBlock, colour: tuple[int, int, int]) -> None:
    """Tint the pixels of a mask, in place."""
    rows, columns = block.pixels.shape
    if block.pixels.size:
        part = picture[:, block.top : block.top + rows, block.left : block.left + columns]
        mask = torch.from_numpy(block.pixels.astype(bool))
        part.copy_(draw_segmentation_masks(part, mask, alpha=_MASK_ALPHA, colors=[colour]))


def _draw_skeleton(
    draw: ImageDraw.ImageDraw, points: np.ndarray, skeleton: Skeleton, colour: tuple[int, int, int], pens: _Pens
) -> None:
    """Draw one object's links, then its points. torchvision's draw_keypoints has white links only, above the points."""
    for a, b in skeleton.links:
        if points[a, 2] > 0 and points[b, 2] > 0:
            ends = [tuple(points[a, :2].tolist()), tuple(points[b, :2].tolist())]
            draw.line(ends, fill=_DARK, width=pens.line + 2)
            draw.line(ends, fill=colour, width=pens.line)
    for x, y, v in points.tolist():
        if v > 0:
            inside = colour if v > 1 else None
            draw.circle((x, y), pens.point + pens.line, outline=_DARK, width=1)
            draw.circle((x, y), pens.point + pens.line - 1, fill=inside, outline=_LIGHT, width=pens.line)


def _has_room_for_names(points: np.ndarray, pens: _Pens) -> bool:
    """Tell whether the drawn points of one object lie a line of text apart on average."""
    drawn = points[points[:, 2] > 0, :2]
    return len(drawn) > 0 and float(np.ptp(drawn, axis=0).max()) >= pens.text * (len(drawn) - 1) * 0.8


def _name_points(draw: ImageDraw.ImageDraw, points: np.ndarray, names: Sequence[str], pens: _Pens) -> None:
    """Write the names of one object's keypoints beside them."""
    font, gap = _font(max(round(pens.text * 0.8), 10)), pens.point + 2 * pens.line
    for (x, y, v), name in zip(points.tolist(), names):
        if v <= 0:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), name, font=font, stroke_width=1)
        places = [
            (x + gap, y - bottom / 2),
            (x - gap - right, y - bottom / 2),
            (x - right / 2, y + gap),
            (x - right / 2, y - gap - bottom),
        ]
        place = _take_place(places, (round(right - left), round(bottom)), pens.taken)
        if place is None:
            continue
        draw.text(place, name, font=font, fill=_LIGHT, stroke_width=max(1, pens.text // 12), stroke_fill=_DARK)


def _draw_caption(
    draw: ImageDraw.ImageDraw, box: list[float], caption: str, colour: tuple[int, int, int], pens: _Pens
) -> None:
    """Write a caption on a ground of the object's colour: above its box, else where there is room around it."""
    font = _font(pens.text)
    margin = max(1, pens.text // 6)
    left, _, right, _ = draw.textbbox((0, 0), caption, font=font)
    # Every caption is as high as the font, so that neighbours stand on one line.
    height, width = round(pens.text * 1.15) + margin, round(right - left) + 2 * margin
    x1, y1, x2, y2 = box
    places = [(x1, y1 - height), (x2 - width, y1 - height), (x1, y2), (x2 - width, y2), (x1, y1), (x2 - width, y1)]
    place = _take_place(places, (width, height), pens.taken)
    if place is None:
        return
    x, y = place
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + margin - left, y + height / 2), caption, font=font, fill=text_colour(colour), anchor="lm")


def text_colour(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is read better (luma of ITU-R BT.601)."""
    return _DARK if np.dot(ground, (0.299, 0.587, 0.114)) > 110 else _LIGHT


def _take_place(
    places: Sequence[tuple[float, float]], extent: tuple[int, int], taken: np.ndarray
) -> tuple[int, int] | None:
    """Take the first of ``places`` that lies in the picture and on no other text, else the least covered one.

    Args:
        places: (x, y) of the top left corner of a text, the best first.
        extent: Its width and height.
        taken: bool [H, W], where text stands; what is taken is marked.

    Returns:
        The place, moved into the picture; None where more than a quarter of it would lie on other text.
    """
    (height, width), (across, down) = taken.shape, extent
    best, least, hidden = (0, 0), math.inf, 0
    for x, y in places:
        inside_x, inside_y = round(min(max(x, 0), max(width - across, 0))), round(min(max(y, 0), max(height - down, 0)))
        covered = int(taken[inside_y : inside_y + down, inside_x : inside_x + across].sum())
        # A place that had to be moved sideways is as good, one moved up or down stands in the wrong place.
        cost = covered + abs(inside_y - y) * across
        if cost < least:
            best, least, hidden = (inside_x, inside_y), cost, covered
        if cost < 1:
            break
    if 4 * hidden > across * down:
        return None
    taken[best[1] : best[1] + down, best[0] : best[0] + across] = True
    return best


def contact_sheet(pictures: Sequence[tuple[str, Tensor]], *, columns: int, cell: int) -> Tensor:
    """Put pictures side by side, each with its title above it.

    Args:
        pictures: (title, uint8 [3, H, W]); a title too long for its cell loses its middle.
        columns: Pictures per row.
        cell: Side in pixels of the square that every picture is shrunk or enlarged into.

    Returns:
        uint8 [3, H, W]; a row is as high as its highest picture.

    Raises:
        ValueError: No picture, or a cell or column count below 1.
    """
    if not pictures or columns < 1 or cell < 1:
        raise ValueError(f"expected pictures, columns and cell, got {len(pictures)}, {columns} and {cell}")
    columns = min(columns, len(pictures))
    text = max(11, cell // 24)
    gap, title_height = max(4, cell // 50), round(text * 1.6)
    shrunk = []
    for title, picture in pictures:
        factor = cell / max(picture.shape[-2:])
        size = [max(1, round(picture.shape[-1] * factor)), max(1, round(picture.shape[-2] * factor))]
        shrunk.append((title, to_pil_image(picture.cpu()).resize(tuple(size), Image.Resampling.LANCZOS)))
    rows = [shrunk[start : start + columns] for start in range(0, len(shrunk), columns)]
    row_heights = [title_height + max(picture.height for _, picture in row) + gap for row in rows]
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, sum(row_heights) + gap), _LIGHT)
    draw, y = ImageDraw.Draw(sheet), gap
    for row, row_height in zip(rows, row_heights):
        inner = row_height - title_height - gap
        for column, (title, picture) in enumerate(row):
            x = gap + column * (cell + gap)
            draw.text((x, y + title_height / 2), _shorten(draw, title, text, cell), _DARK, _font(text), anchor="lm")
            draw.rectangle((x, y + title_height, x + cell - 1, y + title_height + inner - 1), fill=(235, 235, 235))
            place = x + (cell - picture.width) // 2, y + title_height + (inner - picture.height) // 2
            sheet.paste(picture, place)
        y += row_height
    return pil_to_tensor(sheet)


def _shorten(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """Take letters out of the middle of ``text`` until it is no wider than ``width`` pixels."""
    shortened, keep = text, len(text)
    while keep > 2 and draw.textlength(shortened, font=_font(size)) > width:
        keep -= 1
        shortened = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return shortened


def save_picture(picture: Tensor, path: str | Path) -> None:
    """Write a uint8 [3, H, W] picture; the suffix of ``path`` says in which format (.jpg, .png, ...)."""
    path = Path(path)
    kind = Image.registered_extensions()[path.suffix.lower()]
    encoded = io.BytesIO()  # Pillow does not notice a disk that is full when it writes the end of a file
    to_pil_image(picture.cpu()).save(encoded, kind, quality=90)
    with write_aside(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
