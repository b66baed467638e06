"""Reads records through the table of fields, column by column, so that nothing unchecked is ever used.

A column whose values all have their form is taken whole, which is what nearly all files hold; otherwise each value is
looked at alone. The one place that decides what becomes of a wrong value.
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from annotations.fields import FIELDS, Field, is_used
from annotations.findings import Findings
from annotations.forms import number_of_id, short

Record = dict[str, Any]

_IDS_OF_TEXT = "text that is no number"

# A tool spells an entry the same everywhere.
RECORDS_FOR_SPELLING = 100


@dataclass
class _Note:
    """A kind of remark that is made once: where it was true first, and how often it is."""

    kind: str
    place: str
    problem: str
    remedy: str
    count: int = 0


@dataclass
class Notes:
    """Remarks on a file that come once a kind, however many records they are true of.

    Attributes:
        notes: By kind.
        id_texts: {number: text} of all ids that are text.
    """

    notes: dict[tuple[str, ...], _Note] = field(default_factory=dict)
    id_texts: dict[int, str] = field(default_factory=dict)

    def add(self, key: tuple[str, ...], kind: str, place: str, problem: str, remedy: str) -> None:
        """Count one more of the remark ``key``; place and problem of the first one are kept."""
        self.notes.setdefault(key, _Note(kind, place, problem, remedy)).count += 1

    def flush(self, findings: Findings) -> None:
        """Write all remarks down as warnings."""
        for note in self.notes.values():
            more = f", and {note.count - 1} more like it" if note.count > 1 else ""
            findings.warn(note.kind, note.place, note.problem + more, note.remedy)
        self.notes.clear()


class RecordReader:
    """One list of records.

    A wrong value is an error where it is needed, and drops its object or image. Elsewhere it is left out with a
    warning. An object or image that has one error gets no second.

    Args:
        record: ``image``, ``object``, ``category`` or ``result``: which fields of the table.
        rows: The records.
        place: Tells where a record stands.
        findings: Collects what is wrong.
        notes: Collects what is remarked once a kind.
        uses: What is learnt or scored: "bbox", "segm", "keypoints".
        usual_forms: (field, form) that are not worth a remark.
    """

    def __init__(
        self,
        record: str,
        rows: Sequence[Record],
        place: Callable[[int], str],
        findings: Findings,
        notes: Notes,
        uses: Collection[str] = (),
        usual_forms: Collection[tuple[str, str]] = (),
    ) -> None:
        self.record, self.rows, self.place = record, rows, place
        self.findings, self.notes, self.uses = findings, notes, tuple(uses)
        self.usual_forms = usual_forms
        self.dropped = {"image": findings.dropped_images, "object": findings.dropped_objects}.get(record, set())

    def remark_misspelt(self) -> None:
        """Remark entries of the first records that are not read, and spelled nearly like one that is missing."""
        known = [name for record, name in FIELDS if record == self.record]
        for n, row in enumerate(self.rows[:RECORDS_FOR_SPELLING]):
            for key in row.keys() - set(known):
                similar = difflib.get_close_matches(key.lower(), known, 1, cutoff=0.85)
                if similar and similar[0] not in row:
                    problem, remedy = f"unknown entry {short(key)}", f"it is not read; is {similar[0]!r} meant?"
                    self.notes.add(("key", self.record, key), "unknown entry", self.place(n), problem, remedy)

    def column(self, name: str) -> list[Any] | np.ndarray:
        """Return the field ``name`` of all records, in the form that the table gives.

        A wrong or missing value is the field's default there; a fast column of numbers is an array.
        """
        spec = FIELDS[self.record, name]
        default = spec.default
        absent = default if spec.missing else None
        values = [absent if (value := row.get(name)) is None else value for row in self.rows]
        fast = spec.form.fast(values) if values else values
        if fast is not None:
            return fast
        column = []
        for n, row in enumerate(self.rows):
            value = row.get(name)
            if value is None:
                if not spec.missing:
                    # What tells null from a missing key helps to find it in the file.
                    problem = f"{name} is {'null' if name in row else 'missing'}, expected {spec.form.expected}"
                    known = [other for record, other in FIELDS if record == self.record]
                    meant = difflib.get_close_matches(name, set(map(str.lower, row)) - set(known), 1, cutoff=0.7)
                    remedy = (
                        f"is the entry {meant[0]!r} meant? It is called {name!r}" if meant and name not in row else ""
                    )
                    self.wrong(spec, n, problem, remedy=remedy)
                column.append(default)
                continue
            try:
                value, how = spec.form.read(value)
            except ValueError as error:
                self.wrong(spec, n, f"{name} is {short(row[name])}, expected {error}")
                column.append(default)
                continue
            if how:
                self.note(spec, n, row[name], how)
            column.append(value)
        return column

    def ids(self, name: str) -> list[int | None]:
        """Return the ids in the field ``name``; one of text becomes a number (`number_of_id`)."""
        column = self.column(name)
        if str not in set(map(type, column)):
            return list(column)
        numbers: list[int | None] = []
        for n, value in enumerate(column):
            if isinstance(value, str):
                key = ("id", _IDS_OF_TEXT)
                remedy = "such ids get numbers; results files carry the text"
                self.notes.add(key, "form", self.place(n), f"{name} is {short(value)}, {_IDS_OF_TEXT}", remedy)
                number = number_of_id(value)
                self.notes.id_texts[number] = value
                numbers.append(number)
            else:
                numbers.append(value)
        return numbers

    def wrong(self, spec: Field, n: int, problem: str, *, kind: str = "", remedy: str = "") -> None:
        """Report a wrong value of record ``n``: an error, or a warning where nobody needs it."""
        if n in self.dropped:
            return
        kind = kind or (spec.name if spec.name in ("keypoints", "segmentation") else self.record)
        if is_used(spec, self.uses):
            obj, image = (n if self.record == "object" else None), (n if self.record == "image" else None)
            self.findings.error(kind, self.place(n), problem, remedy or spec.remedy, obj=obj, image=image)
        else:
            key = ("unused", self.record, spec.name)
            self.notes.add(key, f"unused {spec.name}", self.place(n), problem, "it is left out; nothing here needs it")

    def note(self, spec: Field, n: int, value: Any, how: str) -> None:
        """Remark that a value was taken although it is in another form."""
        if (spec.name, how) in self.usual_forms:
            return
        problem = f"{spec.name} is {short(value)}, {how}"
        self.notes.add((self.record, spec.name, how), "form", self.place(n), problem, "taken as what it says")
