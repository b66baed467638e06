"""Which image or class is meant where a file's name or a class's name stands in an id's place."""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any


def ids_by_file(images: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return {path, name or stem: id} of images given as (file name, id); what two of them share is left out."""
    return _unique(
        (text, id_) for name, id_ in images for text in {name, PurePosixPath(name).name, PurePosixPath(name).stem}
    )


def ids_by_class(categories: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return {name in lower case: id} of categories given as (name, id); what two of them share is left out."""
    return _unique((_folded(name), id_) for name, id_ in categories)


def explain_file(given: str, ids: Mapping[str, Any]) -> str:
    """Say which image's file is given as an id; "" where it is none's."""
    path = PurePosixPath(given.replace("\\", "/"))
    found = next((key for key in (given, path.name, path.stem) if key in ids), None)
    return "" if found is None else f"{given!r} is the file of the image with id {ids[found]!r}"


def explain_class(given: str, ids: Mapping[str, Any]) -> str:
    """Say which class's name is given as an id; "" where it is none's."""
    id_ = ids.get(_folded(given))
    return "" if id_ is None else f"{given!r} is the name of the category with id {id_!r}"


def _folded(name: str) -> str:
    return " ".join(name.split()).casefold()


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    shared = set()
    for text, id_ in pairs:
        if found.setdefault(text, id_) != id_:
            shared.add(text)
    return {text: id_ for text, id_ in found.items() if text not in shared}
