"""What predict.py leaves to look at: pictures with what was found drawn into them, and ``index.html``."""

from collections.abc import Sequence
from pathlib import Path

from annotations.record_reader import Record
from drawing.viewer import ViewerSettings, page_jpeg, write_viewer_page
from files import write_aside
from inference.found import Found
from inference.trained_model import TrainedModel

PAGE = "index.html"
OVERLAYS, PICTURES = "overlays", "pictures"


def make_folders(output_dir: Path) -> None:
    """Create the folders that `save_result` writes into."""
    for name in (OVERLAYS, PICTURES):
        (output_dir / name).mkdir(exist_ok=True)


def name_files(entry: Record, stem: str) -> None:
    """Note in a picture's entry of ``images.json`` which files `save_result` writes.

    Args:
        entry: Gets ``overlay`` and ``picture``, paths relative to the results.
        stem: Name of the files without a suffix; cut where a file system would not take it.
    """
    name = stem.encode()[:200].decode(errors="ignore") + ".jpg"  # a name has 255 bytes at most
    entry.update(overlay=f"{OVERLAYS}/{name}", picture=f"{PICTURES}/{name}")


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
