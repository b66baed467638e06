"""The labels of a folder's jsons, names or numbers, brought to categories with ids from 1."""

import contextlib
import textwrap
from collections.abc import Sequence
from typing import Any

from annotations.findings import Findings
from annotations.forms import LABEL, MAX_NAME, is_encodable, short
from annotations.labels import bare_name
from annotations.record_reader import Notes, Record

DEFAULT_CLASS = "object"

# Numbers up to the highest label are classes where none has a name; a higher one is somebody's own id.
MAX_NUMBERED_CLASSES = 10_000


def number_labels(
    given: Sequence[Any], places: Sequence[str], classes: Sequence[str], notes: Notes, findings: Findings
) -> tuple[list[Record], list[int]]:
    """Return (categories, category id of every object); ids count from 1.

    Args:
        given: Each object's label as its file has it; None where it has none.
        places: Where each object stands.
        classes: Names of the labels 1, 2, ...; empty where the labels decide.
        notes: Collects what is remarked once a kind.
        findings: Collects what is wrong.
    """
    labels = _read_labels(given, places, notes)
    names = list(classes)
    are_texts = False
    if not names:
        texts = sorted({label for label in labels if isinstance(label, str)})
        numbers = [label for label in labels if isinstance(label, int)]
        are_texts = bool(texts)
        if texts:
            names = texts
        elif numbers and max(numbers) <= MAX_NUMBERED_CLASSES:
            names = [str(n) for n in range(1, max(numbers) + 1)]
        elif numbers:
            problem = f"label {max(numbers)} would make as many classes; the limit is {MAX_NUMBERED_CLASSES}"
            place = places[labels.index(max(numbers))]
            findings.error("label", place, problem, "number classes from 1, or write their names")
            return [{"id": 1, "name": DEFAULT_CLASS}], [1] * len(labels)
        else:
            names = [DEFAULT_CLASS]
    number_of = {name: k + 1 for k, name in enumerate(names)}
    ids = []
    for n, label in enumerate(labels):
        number = 1 if given[n] is None and len(names) == 1 else 0
        if isinstance(label, str):
            number = number_of.get(label, 0)
        elif label is not None and label <= len(names) and not are_texts:
            number = label
        if number == 0:
            expected = _expected(given[n], names, are_texts, are_texts and label is not None)
            findings.error("label", places[n], f"label {short(given[n])}", expected, obj=n)
        ids.append(max(number, 1))
    return [{"id": k + 1, "name": name} for k, name in enumerate(names)], ids


def _read_labels(given: Sequence[Any], places: Sequence[str], notes: Notes) -> list[int | str | None]:
    """Return names and numbers; None for what is neither."""
    labels: list[int | str | None] = []
    for label, place in zip(given, places):
        taken, how = None, ""
        if isinstance(label, str):
            taken = label if is_encodable(label) and len(label) <= MAX_NAME else None
        elif label is not None:
            with contextlib.suppress(ValueError):
                taken, how = LABEL.read(label)
        if how:
            notes.add(("label", how), "form", place, f"label {short(label)}, {how}", "taken as what it says")
        labels.append(taken)
    return labels


def _expected(given: Any, names: Sequence[str], are_texts: bool, is_mixed: bool) -> str:
    """Say what a label should be, and why this one is none."""
    some = textwrap.shorten(", ".join(names[:10]), 200, placeholder=" ...")
    expected = f"expected one of {some}" if are_texts else f"expected a number from 1 to {len(names)} or one of {some}"
    if is_mixed:
        expected += ": numbers and names are mixed, and no dataset.json says which class a number is"
    if given == 0 and given is not False:
        return "0 is background; " + expected
    same = [name for name in names if isinstance(given, str) and bare_name(name) == bare_name(given)]
    return f"differs from {short(same[0])} in upper and lower case or blanks; {expected}" if same else expected
