"""Plots as PNG bytes: precision over recall, confusions, learning curves. matplotlib is loaded when one is drawn."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#a5aa00", "#666666", "#b22222")  # fmt: skip  # noqa: E501

# More classes than that are not told apart by colour.
MAX_NAMED_CLASSES = 10
# With more classes a matrix is drawn without its small numbers and without classes that do not occur, and for the
# `MAX_MATRIX_CLASSES` with the most objects at most; the file has all.
MAX_WHOLE_MATRIX = 15
MAX_MATRIX_CLASSES = 50


def _new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """Return an empty figure of the given size in inches, without a display and without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _to_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # a script that the font does not have
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def _plain(text: str, longest: int = 22) -> str:
    """Return a name that is not read as a formula and not longer than its place."""
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")


def plot_precision_recall(recall: np.ndarray, precision: np.ndarray, names: Sequence[str], overlap: str) -> bytes:
    """Draw precision over recall of every class and their mean.

    Args:
        recall: float [R].
        precision: float [R, K]; NaN for classes without objects.
        names: K names.
        overlap: What detections were matched by, "IoU" or "OKS".
    """
    figure, axes = _new_figure(4.6, 3.6)
    known = np.flatnonzero(np.isfinite(precision).all(axis=0))
    average = precision[:, known].mean(axis=0)
    if len(known) > 1:
        named = known[np.argsort(average, kind="stable")][:5] if len(known) > MAX_NAMED_CLASSES else known
        axes.plot(recall, precision[:, np.setdiff1d(known, named)], color="#bbbbbb", linewidth=0.6)
    else:
        named = known
    for k, colour in zip(named.tolist(), LINE_COLOURS):
        # Matplotlib leaves names that begin with _ out of legends.
        label = f"{_plain(names[k].removeprefix('_'))}  {precision[:, k].mean():.3f}"
        axes.plot(recall, precision[:, k], color=colour, linewidth=1.6, label=label)
    if len(known) > 1:
        label = f"mean of {len(known)} classes  {average.mean():.3f}"
        axes.plot(recall, precision[:, known].mean(axis=1), color="black", linewidth=2.2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel=f"precision at {overlap} 0.50")
    axes.grid(color="#dddddd", linewidth=0.6)
    if len(known):
        has_many = len(known) > MAX_NAMED_CLASSES
        axes.legend(
            title="AP50, five lowest" if has_many else "AP50",
            fontsize=8,
            title_fontsize=8,
            # To look for the best place among many lines takes longer than to draw them.
            loc="best" if not has_many else "lower left" if average.mean() > 0.5 else "upper right",
            framealpha=0.85,
        )
    return _to_png(figure)


def plot_confusion(confusion: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw the confusion matrix: colour is the share of the row, numbers are counts.

    Args:
        confusion: int [K + 1, K + 1], see `Analysis.confusion`.
        names: K names.
    """
    num_classes = len(names)
    occurs = (confusion.sum(axis=1) + confusion.sum(axis=0))[:-1] > 0 if num_classes > MAX_WHOLE_MATRIX else True
    most = np.argsort(-np.where(occurs, 1 + confusion[:-1].sum(axis=1), 0), kind="stable")
    shown = np.r_[
        np.sort(most[: min(int(np.broadcast_to(occurs, num_classes).sum()), MAX_MATRIX_CLASSES)]), num_classes
    ]
    counts = confusion[np.ix_(shown, shown)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels = [_plain(names[k], 16) for k in shown[:-1]]
    side = min(1.8 + 0.36 * len(shown), 10)
    room = 0.12 * max(map(len, [*labels, "(no object)"]))  # inches that names take
    figure, axes = _new_figure(side + room, side + (room if len(shown) > 4 else 0))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(shown) <= 25 else 7
    axes.set_xticks(range(len(shown)), [*labels, "(missed)"], rotation=90 if len(shown) > 4 else 0, fontsize=size)
    axes.set_yticks(range(len(shown)), [*labels, "(no object)"], fontsize=size)
    axes.set(xlabel="detected as (darker: larger share of the row)", ylabel="object")
    # Thousands of numbers would take seconds to draw, and few of them could be read.
    numbered = zip(*np.nonzero(shares >= 0.02)) if num_classes > MAX_WHOLE_MATRIX else np.ndindex(*counts.shape)
    for row, column in numbered:
        if (row, column) != (len(shown) - 1, len(shown) - 1):
            colour = "white" if shares[row, column] > 0.55 else "black"
            number = str(counts[row, column])
            text = axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=size - 1)
            text.set_in_layout(False)
    return _to_png(figure)


def plot_lines(
    epochs: Sequence[int],
    lines: Mapping[str, Sequence[float | None]],
    *,
    label: str,
    bands: Mapping[str, Sequence[Any]] | None = None,
) -> bytes:
    """Draw values over epochs, on an axis that starts at 0.

    Args:
        epochs: Numbers of the epochs.
        lines: Values by name, one per epoch; None leaves a gap.
        label: Text beside the vertical axis.
        bands: By the same names [low, high] or None per epoch: drawn as a band around the line.
    """
    figure, axes = _new_figure(4.2, 2.9)
    marker = "o" if len(epochs) <= 30 else None
    for (name, values), colour in zip(lines.items(), LINE_COLOURS):
        heights = np.array([np.nan if v is None else v for v in values], dtype=float)
        axes.plot(epochs, heights, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=_plain(name))
        if bands and name in bands:
            edges = np.array([(np.nan, np.nan) if b is None else b for b in bands[name]], dtype=float)
            axes.fill_between(epochs, edges[:, 0], edges[:, 1], color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel=label)
    axes.locator_params(axis="x", integer=True)
    if len(set(epochs)) == 1:
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
        axes.set_xticks(list(set(epochs)))
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    if len(lines) > 1:
        axes.legend(fontsize=8, framealpha=0.85)
    return _to_png(figure)
