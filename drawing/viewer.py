"""A page of pictures with boxes, outlines of masks and keypoints over them, to be looked at in a browser.

A slider for the score, a switch per class, keys to step; ``viewer.html``, ``viewer.css`` and ``viewer.js`` go into the
page as they are, so that it needs nothing from elsewhere. What comes from users, names of files and classes, is JSON in
the page, and the script treats it as text.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from drawing.pictures import PALETTE, Drawn, text_colour
from files import write_aside
from pixels.masks import MaskBlock
from pixels.outlines import outlines

# Longer side in pixels of the pictures on a page.
LONG_SIDE = 1280

_PARTS = {suffix: Path(__file__).with_name(f"viewer.{suffix}") for suffix in ("html", "css", "js")}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; background: #f6f7f9; color: #1c2127; font: 16px/1.5 system-ui, sans-serif; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #14171a; color: #e6e9ec; }} }}
main {{ max-width: 110rem; margin: 0 auto; padding: 0.8rem 1rem 2rem; }}
h1 {{ font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }}
h1 + p {{ margin: 0 0 0.8rem; font-size: 0.9rem; opacity: 0.75; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{below}</p>
{viewer}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class ViewerSettings:
    """What holds for all pictures of a page.

    Attributes:
        class_names: Names by category id.
        links: Pairs of keypoints that are joined.
        lowest: Detections with lower scores are not on the page; where the slider ends.
        start: Where the slider stands at first.
        note: Said under the slider: what ``lowest`` comes from.
        alone: The page shows nothing else, so that keys are the viewer's from the start.
    """

    class_names: Mapping[int, str]
    links: Sequence[tuple[int, int]]
    lowest: float
    start: float
    note: str
    alone: bool = False


def viewer_picture(
    source: str,
    name: str,
    size: tuple[int, int],
    found: Drawn,
    scores: np.ndarray,
    *,
    truth: Drawn | None = None,
    group: str = "",
    note: str = "",
) -> str:
    """Return the JSON of one picture of a page.

    Args:
        source: Address of the picture: a data URI, or a path relative to the page.
        name: Its file, as users know it.
        size: (height, width) in pixels of the coordinates; the picture itself may be smaller.
        found: Detections, in falling order of scores.
        scores: float [N], in 0..1.
        truth: Annotated objects, drawn in another way.
        group: Heading that it stands under, with its neighbours of the same one.
        note: A line below the large picture.
    """
    height, width = size
    tolerance = max(1.0, max(size) / LONG_SIDE)
    objects = _plain_objects(found, scores, tolerance)
    if truth is not None:
        objects += _plain_objects(truth, None, tolerance)
    picture = {
        "source": source if source.startswith("data:") else quote(source),
        "name": name,
        "width": width,
        "height": height,
        "objects": objects,
    }
    texts = {"group": group, "note": note}
    return to_json({**picture, **{key: text for key, text in texts.items() if text}})


def _plain_objects(drawn: Drawn, scores: np.ndarray | None, tolerance: float) -> list[list[Any]]:
    """Return objects as the script reads them: class, score, x1, y1, x2, y2, outline, x, y, v of keypoints, caption.

    An annotated one has no score, and a caption instead.
    """
    objects = []
    for n, (id_, box) in enumerate(zip(drawn.colours.tolist(), np.round(drawn.boxes, 1).tolist())):
        # Cut, not rounded: a score is at a threshold of four digits or above exactly where it was before.
        score = None if scores is None else _floor(float(scores[n]))
        outline = "" if drawn.masks is None else outline_path(drawn.masks[n], tolerance)
        points = [] if drawn.keypoints is None else np.round(drawn.keypoints[n], 1).reshape(-1).tolist()
        plain: list[Any] = [id_, score, *map(_short, box), outline, [_short(value) for value in points]]
        if scores is None:
            plain.append(drawn.captions[n])
        while len(plain) > 6 and not plain[-1]:  # what is not there takes no room at the end
            plain.pop()
        objects.append(plain)
    return objects


def _floor(score: float) -> float:
    """Cut a score after four digits, those that are not exact in binary included."""
    return int(score * 1e4 + 1e-9) / 1e4


def _short(value: float) -> float | int:
    """Return whole numbers as integers, which are shorter in JSON."""
    return int(value) if value == int(value) else value


def outline_path(block: MaskBlock, tolerance: float) -> str:
    """Return the outline of a mask, holes included, as the path of an SVG, to be filled by the even-odd rule."""
    path = ""
    for line in outlines(block, tolerance):
        steps = np.diff(line, axis=0).reshape(-1).tolist()
        path += f"M{line[0, 0]} {line[0, 1]}l{' '.join(map(str, steps))}z"
    return path.replace(" -", "-")


def to_json(value: Any) -> str:
    """Return JSON in ASCII that no HTML parser takes for the end of a script or a comment."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def embedded_jpeg(pixels: np.ndarray) -> str:
    """Return `page_jpeg` as a data URI, for a page without files beside it."""
    return f"data:image/jpeg;base64,{base64.b64encode(page_jpeg(pixels)).decode()}"


def viewer_fragment(settings: ViewerSettings, pictures: Sequence[str]) -> str:
    """Return the HTML that shows pictures, to stand once on a page.

    Args:
        settings: What holds for all of them.
        pictures: From `viewer_picture`; neighbours of one group beside each other.
    """
    colours = {id_: PALETTE[id_ % len(PALETTE)] for id_ in settings.class_names}
    head = {
        "classes": {
            id_: [name, *(f"#{bytes(c).hex()}" for c in (colours[id_], text_colour(colours[id_])))]
            for id_, name in settings.class_names.items()
        },
        "links": settings.links,
        "lowest": _floor(settings.lowest),
        "start": _floor(settings.start),
        "note": settings.note,
        "alone": settings.alone,
    }
    content = f'{to_json(head)[:-1]},"pictures":[\n' + ",\n".join(pictures) + "\n]}"
    parts = {suffix: path.read_text(encoding="utf-8") for suffix, path in _PARTS.items()}
    data = f'<script type="application/json" class="v-content">\n{content}\n</script>\n</section>'
    body = parts["html"].replace("</section>", data)
    return f"<style>\n{parts['css']}</style>\n{body}<script>\n{parts['js']}</script>\n"


def write_viewer_page(path: Path, title: str, below: str, settings: ViewerSettings, pictures: Sequence[str]) -> None:
    """Write a page with nothing but pictures, whole or not at all.

    Args:
        path: The page, an HTML file.
        title: Its name, and the heading.
        below: A line under the heading.
        settings: What holds for all pictures.
        pictures: From `viewer_picture`, with sources relative to the page's folder.
    """
    viewer = viewer_fragment(settings, pictures)
    text = _PAGE.format(title=html.escape(title), below=html.escape(below), viewer=viewer)
    with write_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page_jpeg(pixels: np.ndarray) -> bytes:
    """Return a picture as it stands on a page: JPEG, its longer side `LONG_SIDE` at most.

    Args:
        pixels: uint8 [H, W, 3].
    """
    image = Image.fromarray(pixels)
    image.thumbnail((LONG_SIDE, LONG_SIDE), reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
