"""What is wrong with a dataset, one line per finding, collected before anything is trained.

A finding names the file, the place in it, what was expected and found, and what to do. Errors end the run, all at
once; warnings are counted. With ``--on-bad-data skip`` an error about one object or image becomes a warning
and that object or image is left out.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

logger = logging.getLogger(__name__)

ON_BAD_DATA = ("error", "skip")

# So many lines per kind are printed; the rest is counted.
LINES_PER_KIND = 20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: A short name, the same for all findings of this sort.
        place: File and position in it.
        problem: What was expected and what was found.
        remedy: What to do.
        is_error: Whether training must not start.
        count: How many of its kind it stands for: in a row that `shorten` has cut, the last one has neither place nor
            problem and stands for all that are not listed.
    """

    kind: str
    place: str
    problem: str
    remedy: str
    is_error: bool = True
    count: int = 1

    @property
    def example(self) -> str:
        """Place and problem in one line; empty where it stands for findings that are not listed."""
        return f"{self.place}: {self.problem}" if self.place else self.problem

    def __str__(self) -> str:
        """Return the finding in one line."""
        if not self.problem:
            return f"... and {self.count} more of kind {self.kind}"
        return f"{self.example}; {self.remedy}" if self.remedy else self.example


class BadDataError(ValueError):
    """A dataset that cannot be trained or scored; the text has one line per finding."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        lines = [str(f) for f in shorten(f for f in findings if f.is_error)]
        super().__init__("\n".join([f"{sum(f.is_error for f in findings)} error(s) in the data:", *lines]))


@dataclass
class Findings:
    """Collects findings and what they say should be left out.

    Attributes:
        on_bad_data: ``error`` or ``skip``, see the module's text.
        found: In the order in which they were found.
        dropped_objects: Positions of objects to leave out.
        dropped_images: Positions of images to leave out.
    """

    on_bad_data: str = "error"
    found: list[Finding] = field(default_factory=list)
    dropped_objects: set[int] = field(default_factory=set)
    dropped_images: set[int] = field(default_factory=set)

    def error(
        self,
        kind: str,
        place: str,
        problem: str,
        remedy: str,
        *,
        obj: int | None = None,
        image: int | None = None,
        objects: Collection[int] = (),
        images: Collection[int] = (),
    ) -> None:
        """Note an error; ``obj``, ``image``, ``objects``, ``images`` say by position what ``skip`` leaves out."""
        one_object, one_image = [obj] if obj is not None else [], [image] if image is not None else []
        skips = self.on_bad_data == "skip" and bool(one_object or one_image or objects or images)
        if skips:
            what = "the object is" if one_object else "the image is" if one_image else "they are"
            remedy = f"{what} left out"
        self.dropped_objects.update(one_object, objects)
        self.dropped_images.update(one_image, images)
        self.found.append(Finding(kind, place, problem, remedy, is_error=not skips))

    def warn(self, kind: str, place: str, problem: str, remedy: str) -> None:
        """Note something that was repaired or is only suspicious."""
        self.found.append(Finding(kind, place, problem, remedy, is_error=False))

    def raise_errors(self) -> None:
        """Raise `BadDataError` with all findings if there is an error among them."""
        if any(finding.is_error for finding in self.found):
            raise BadDataError(self.found)

    def warnings(self) -> tuple[Finding, ...]:
        """Return the warnings, with long rows of one kind counted instead of listed."""
        return tuple(shorten(f for f in self.found if not f.is_error))


def shorten(findings: Iterable[Finding]) -> list[Finding]:
    """Return `LINES_PER_KIND` findings of each kind at the most, then one that counts the rest of each kind."""
    listed: list[Finding] = []
    rest: dict[str, Finding] = {}
    seen: Counter[str] = Counter()
    for finding in findings:
        seen[finding.kind] += 1
        if seen[finding.kind] <= LINES_PER_KIND:
            listed.append(finding)
        elif finding.kind not in rest:
            rest[finding.kind] = replace(finding, place="", problem="")
    return listed + [replace(one, count=seen[kind] - LINES_PER_KIND) for kind, one in rest.items()]
