"""What is worth knowing about a dataset, counted, with the worst examples, as text.

A `Finding` is one place that is wrong; an `Observation` is all places of one sort together.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from annotations.findings import Finding

# So many examples of one sort are shown; the rest is counted.
NUM_EXAMPLES = 5

LINE_WIDTH = 120


@dataclass(frozen=True)
class Observation:
    """Everything of one sort.

    Attributes:
        title: What it is, with how many of how many.
        examples: The worst, each naming its file.
        advice: What to do; empty where the examples say it.
        count: How many there are; examples beyond `NUM_EXAMPLES` are not kept.
        is_error: Whether training refuses to start, or will stop at it.
    """

    title: str
    examples: tuple[str, ...] = ()
    advice: str = ""
    count: int = 1
    is_error: bool = False


def observe_worst(
    title: str, scores: np.ndarray, format_example: Callable[[int], str], advice: str
) -> list[Observation]:
    """Return an observation with the examples of highest score, or nothing where there is none.

    Args:
        title: Follows the count.
        scores: float [N], how bad each one is; NaN for one that is not bad.
        format_example: Tells in a line what is at a position, beginning with the file.
        advice: What to do.
    """
    bad = np.flatnonzero(~np.isnan(scores))
    if not len(bad):
        return []
    worst = bad[np.argsort(-scores[bad], kind="stable")[:NUM_EXAMPLES]]
    examples = tuple(format_example(int(n)) for n in worst)
    return [Observation(f"{len(bad)} of {len(scores)} {title}", examples, advice, count=len(bad))]


def group_findings(findings: Iterable[Finding]) -> list[Observation]:
    """Put findings of one kind together; each example is the line that training prints."""
    kinds: dict[tuple[bool, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.is_error, finding.kind), []).append(finding)
    return [
        Observation(kind, tuple(str(f) for f in found[:NUM_EXAMPLES]), "", len(found), is_error)
        for (is_error, kind), found in kinds.items()
    ]


def group_warnings(findings: Iterable[Finding]) -> list[Observation]:
    """Put warnings with the same remedy together; one without a remedy stays alone."""
    remedies: dict[str, list[Finding]] = {}
    rest: list[Observation] = []
    for finding in findings:
        if finding.remedy:
            remedies.setdefault(finding.remedy, []).append(finding)
        else:
            rest.append(Observation(str(finding)))
    grouped = []
    for remedy, found in remedies.items():
        count = sum(f.count for f in found)
        examples = [f.example for f in found if f.example][:NUM_EXAMPLES]
        grouped.append(Observation(f"{remedy} ({count})", tuple(examples), "", count))
    return [*grouped, *rest]


def format_observations(observations: Sequence[Observation]) -> str:
    """Return observations as text: title, examples, advice."""
    blocks = []
    for seen in observations:
        number = f": {seen.count}" if seen.is_error else ""
        lines = [*_wrap(seen.title + number, "  ", "    "), *(f"      {example}" for example in seen.examples)]
        if seen.examples and seen.count > len(seen.examples):
            lines.append(f"      ... and {seen.count - len(seen.examples)} more")
        if seen.advice:
            lines.extend(_wrap(f"-> {seen.advice}", "    ", "       "))
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def format_facts(lines: Iterable[str], indent: str = "") -> list[str]:
    """Return lines broken at the page's width; rows of a table are left as they are."""
    return [part for line in lines for part in ([line] if line[:1] == " " else _wrap(line, indent, indent + "  "))]


def _wrap(text: str, first: str, later: str) -> list[str]:
    wrapper = textwrap.TextWrapper(LINE_WIDTH, first, later, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text)
