"""Ids of pictures: those of an annotation file, found by the file's name."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from coco_utils import read_image_ids
from pixels.image_files import spelling


def ids_from_file(paths: Sequence[Path], annotation_file: Path) -> list[int | str]:
    """Return the id that a COCO file has for each picture.

    A name in the file that has folders must be the end of the picture's path; one without is its last part.

    Args:
        paths: The pictures.
        annotation_file: With ``images``; nothing else in it is read.

    Raises:
        ValueError: Pictures that are not in the file, or two that have one id.
    """
    by_name: dict[str, list[tuple[str, int | str]]] = {}
    for name, id_ in read_image_ids(annotation_file).items():
        plain = spelling(PurePosixPath(name.replace("\\", "/")).as_posix())
        by_name.setdefault(plain.rpartition("/")[2], []).append((plain, id_))
    ids: list[int | str] = []
    unknown: list[Path] = []
    picture_of: dict[int | str, Path] = {}
    for path in paths:
        whole = "/" + spelling(path.absolute().as_posix())
        found = [pair for pair in by_name.get(spelling(path.name), ()) if whole.endswith("/" + pair[0])]
        if not found:
            unknown.append(path)
            continue
        id_ = max(found, key=lambda pair: len(pair[0]))[1]  # the one with the most folders
        if id_ in picture_of:
            raise ValueError(
                f"--ids-from {annotation_file}: {picture_of[id_]} and {path} both are its image {id_!r}; predict one "
                "folder at a time"
            )
        picture_of[id_] = path
        ids.append(id_)
    if unknown:
        raise ValueError(
            f"--ids-from {annotation_file}: {len(unknown)} of {len(paths)} pictures are not among its images, such as "
            f"{unknown[0]}; leave them out, or add them to the file"
        )
    return ids
