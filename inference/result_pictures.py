"""What predict.py leaves to look at: pictures with what was found drawn into them, and ``index.html``."""

import sys
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from annotations.record_reader import Record
from drawing.viewer import ViewerSettings, page_jpeg, write_viewer_page
from files import write_aside
from inference.found import Found
from inference.picture_files import BadFile
from inference.trained_model import TrainedModel
from pixels.image_files import printable

PAGE = "index.html"
OVERLAYS, PICTURES = "overlays", "pictures"


class PictureResults:
    """What became of pictures.

    Attributes:
        paths: The pictures.
        ids: The id of each.
        images: An entry per picture that was looked at; with overlays it names the files of it.
        skipped: Those that could not be read, with the reason.
        page_parts: What `write_page` takes, a part per picture that was drawn.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], ids: Sequence[int | str], overlays: bool) -> None:
        """Start with nothing.

        Args:
            folder: Takes the overlays and the pictures of the page.
            paths: The pictures.
            ids: The id of each.
            overlays: Whether to write any.
        """
        self.paths, self.ids = paths, ids
        self.images: list[Record] = []
        self.skipped: list[Record] = []
        self.page_parts: list[str] = []
        self._folder, self._overlays = folder, overlays
        self._drawing: list[tuple[Record, Future[str]]] = []

    def add(self, found: Found, pool: Executor) -> None:
        """Note a picture, and have its files written by ``pool``.

        Args:
            found: With the picture's place among ``paths`` as its index.
            pool: Writes what `finish_drawing` waits for.
        """
        path, (height, width) = self.paths[found.index], found.size
        entry = {"id": self.ids[found.index], "file_name": str(path), "height": height, "width": width}
        self.images.append(entry)
        if self._overlays:
            for name in (OVERLAYS, PICTURES):
                (self._folder / name).mkdir(exist_ok=True)
            name = f"{found.index + 1:0{len(str(len(self.paths)))}d}_{short_stem(path)}.jpg"
            entry.update(overlay=f"{OVERLAYS}/{name}", picture=f"{PICTURES}/{name}")
            self._drawing.append((entry, pool.submit(save_result, found, self._folder, entry)))

    def skip(self, bad: BadFile) -> None:
        """Note and tell of a picture that could not be read."""
        path = self.paths[bad.index]
        self.skipped.append({"id": self.ids[bad.index], "file_name": str(path), "reason": bad.reason})
        with suppress(BrokenPipeError):  # images.json says it too
            tqdm.write(f"skipped: {printable(str(path))}: {bad.reason}", file=sys.stderr)

    def finish_drawing(self) -> OSError | None:
        """Wait for the files of all pictures so far.

        Returns:
            The first error; the files of pictures with one are taken from their entries.
        """
        failure = None
        for entry, future in self._drawing:
            error = future.exception()
            if error is None:
                self.page_parts.append(future.result())
                continue
            if not isinstance(error, OSError):
                raise error
            failure = failure or error
            del entry["overlay"], entry["picture"]
        self._drawing = []
        return failure

    def not_reached(self) -> list[Record]:
        """Return an entry for each picture that is in neither list."""
        done = {entry["id"] for entry in self.images + self.skipped}
        return [{"id": id_, "file_name": str(path)} for id_, path in zip(self.ids, self.paths) if id_ not in done]


def short_stem(path: Path) -> str:
    """Return a file's name without its suffix, short enough to be part of one: a name has 255 bytes at most."""
    return path.stem.encode(errors="replace")[:200].decode(errors="ignore")


def save_result(found: Found, output_dir: Path, entry: Record) -> str:
    """Write the picture with what was found drawn into it, and a plain one for the page; returns its part of the page.

    Raises:
        OSError: One of them cannot be written.
    """
    found.save(output_dir / entry["overlay"])
    with write_aside(output_dir / entry["picture"]) as temporary:
        temporary.write_bytes(page_jpeg(found.picture))
    return found.to_viewer(entry["picture"], entry["file_name"])


def write_page(output_dir: Path, trained: TrainedModel, threshold: float, pictures: Sequence[str], below: str) -> None:
    """Write ``index.html``, the page to look at results.

    Args:
        output_dir: The folder of results.
        trained: The model that found them.
        threshold: Nothing of a lower score was kept.
        pictures: From `save_result`.
        below: A line under the heading.

    Raises:
        OSError: It cannot be written.
    """
    note = f"Nothing below {threshold:.4g} was kept; to see less sure ones, predict with a lower --score-threshold."
    settings = ViewerSettings(
        trained.class_names, trained.skeleton.links, lowest=threshold, start=threshold, note=note, alone=True
    )
    title = f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'}: what {trained.spec.name} found"
    write_viewer_page(output_dir / PAGE, title, below, settings, pictures)
