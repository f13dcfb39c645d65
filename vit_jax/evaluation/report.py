"""One picture that shows how a training run went: report.png.

Learning curves, the confusion matrix and test pictures with what the model says of them. Drawn with
matplotlib's objects alone: no pyplot, no window, no state left behind.
"""

import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Picture = tuple[np.ndarray, int, int, float]

# Okabe & Ito's palette, told apart with any colour vision; green and red are darkened to be read.
TRAIN, TEST, RATE, RIGHT, WRONG = "#0072B2", "#D55E00", "#777777", "#00694B", "#B3261E"
MAX_PICTURES, COLUMNS = 12, 6
COUNTED_CLASSES = 15  # with more, counts in the cells could not be read
NAMED_CLASSES = 40  # with more, only some classes are named on the axes
CAPTION_CHARS = 26  # what fits above a picture
TINY = 96  # pictures of fewer pixels a side are magnified as they are, without smoothing


def training_report(
    path: Path,
    *,
    metrics: list[dict[str, Any]],
    confusion: np.ndarray,
    labels: Sequence[str],
    pictures: Sequence[Picture],
    title: str,
) -> None:
    """Draws the report and puts it at `path`, whole or not at all.

    Args:
        path: the PNG to write; its folder is made if it is not there.
        metrics: records of metrics.jsonl, each with "step" and any of "train/loss", "test/loss",
            "train/lr", "test/top1" (a fraction). Curves without a finite point are left out.
        confusion: (k, k) counts of test examples, a row for each true class.
        labels: the k class names.
        pictures: up to 12 (image uint8 (h, w, 1 or 3), true class, predicted class, probability of
            the predicted class); more are not drawn.
        title: headline, such as the model and the data set.

    Raises:
        UserError: if the confusion matrix and the labels do not fit together.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    k = len(labels)
    if k == 0 or confusion.shape != (k, k):
        raise UserError(
            f"Found a confusion matrix of shape {confusion.shape} and {k} class names; expected "
            f"({k}, {k}): pass the names of exactly the classes that were counted."
        )
    names = [" ".join(str(label).split()) for label in labels]
    pictures = pictures[:MAX_PICTURES]
    rows = math.ceil(len(pictures) / COLUMNS)

    heights = [7.0, *([2.5 * rows] if rows else [])]
    figure = Figure(figsize=(14, sum(heights) + 0.7), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    headline = textwrap.shorten(title, 110, placeholder=" ...")
    figure.suptitle(headline, fontsize=15, fontweight="bold", parse_math=False)
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curves = {
        key: points
        for key in ("train/loss", "test/loss", "train/lr", "test/top1")
        if (points := _curve(metrics, key))
    }
    if curves:
        left, right = upper.subfigures(1, 2, width_ratios=[1, 1.15])
        _draw_curves(left, curves)
    else:
        right = upper
    _draw_confusion(right, confusion, names)
    if lower:
        _draw_pictures(lower[0], pictures, names, rows)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with warnings.catch_warnings():
            # Names in scripts that the font lacks are drawn as boxes: a warning says no more.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _curve(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """The (step, value) points of one scalar, without what is no number."""
    points = [(record["step"], record[key]) for record in metrics if key in record]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _draw_curves(figure: "SubFigure", curves: dict[str, list[tuple[int, float]]]) -> None:
    """Loss, accuracy and learning rate, one above the other, over the same steps."""
    from matplotlib.ticker import MaxNLocator

    panels = {
        name: height
        for name, keys, height in (
            ("loss", ("train/loss", "test/loss"), 3.0),
            ("accuracy", ("test/top1",), 3.0),
            ("rate", ("train/lr",), 1.0),
        )
        if any(key in curves for key in keys)
    }
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=list(panels.values())
    )[:, 0]
    for name, ax in zip(panels, axes, strict=True):
        if name == "loss":
            _draw_loss(ax, curves.get("train/loss", []), curves.get("test/loss", []))
        elif name == "accuracy":
            _draw_accuracy(ax, curves["test/top1"])
        else:
            _draw_rate(ax, curves["train/lr"])
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    last = max(step for points in curves.values() for step, _ in points)
    axes[-1].set_xlim(0, max(last, 1) * 1.02)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes[-1].set_xlabel("step")


def _draw_loss(ax: "Axes", train: list[tuple[int, float]], test: list[tuple[int, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for points, name, color in ((train, "train", TRAIN), (test, "test", TEST)):
        if points:
            (line,) = ax.plot(*zip(*points, strict=True), color=color, linewidth=1.5, label=name)
            if name == "test" or len(points) == 1:  # without a mark one point cannot be seen
                line.set(marker="o", markersize=4, clip_on=False)
    values = [value for _, value in (*train, *test)]
    if min(values) > 0 and max(values) / min(values) > 50:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=min(0, min(values)))
    ax.set_title("Loss", fontsize=11, loc="left")
    # Above the panel, where no curve can run through it.
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2, frameon=False)


def _draw_accuracy(ax: "Axes", top1: list[tuple[int, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = zip(*((step, 100 * value) for step, value in top1), strict=True)
    best = int(np.argmax(values))
    ax.plot(steps, values, color=TEST, linewidth=1.5, marker="o", markersize=4, clip_on=False)
    pad = max(4.0, 0.1 * (max(values) - min(values)))
    ax.set_ylim(max(0.0, min(values) - pad), min(100.5, max(values) + pad))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    text = f"Test accuracy: {values[-1]:.1f}% at the end"
    if values[best] > values[-1]:
        text += f", best {values[best]:.1f}% at step {steps[best]:,}"
    ax.set_title(text, fontsize=11, loc="left")


def _draw_rate(ax: "Axes", rates: list[tuple[int, float]]) -> None:
    steps, values = zip(*rates, strict=True)
    ax.plot(steps, values, color=RATE, linewidth=1.2, marker="o" if len(steps) == 1 else "")
    ax.set_yticks(sorted({0.0, max(values)}))
    ax.set_ylim(0, 1.1 * max(values) or 1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    ax.set_title("Learning rate", fontsize=10, loc="left")


def _draw_confusion(figure: "SubFigure", confusion: np.ndarray, names: list[str]) -> None:
    ax = figure.subplots()
    k, total = len(names), int(confusion.sum())
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", norm=_color_scale(k), interpolation_stage="data")
    shown = np.arange(0, k, math.ceil(k / NAMED_CLASSES))
    size = min(10.0, max(5.5, 260 / len(shown)))
    ticks = [_elide(names[i], 22) for i in shown]
    ax.set_xticks(shown, ticks, fontsize=size, rotation=90 if k > 10 else 45, parse_math=False)
    ax.set_yticks(shown, ticks, fontsize=size, parse_math=False)
    if k <= 10:
        for label in ax.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    right = int(np.trace(confusion))
    text = f"{right:,} of {total:,} right ({right / max(total, 1):.1%})"
    ax.set_title(f"Confusion matrix: {text}", fontsize=11, loc="left")
    if k <= COUNTED_CLASSES:
        _write_counts(ax, confusion, share)
    else:
        bar = figure.colorbar(
            image, ax=ax, shrink=0.6, fraction=0.04, pad=0.02, format=lambda x, _: f"{x:.0%}"
        )
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)


def _color_scale(k: int) -> Any:
    """Linear where the counts can be read; else a square root, so that rare mistakes are seen."""
    from matplotlib.colors import Normalize, PowerNorm

    return Normalize(0, 1) if k <= COUNTED_CLASSES else PowerNorm(0.5, 0, 1)


def _write_counts(ax: "Axes", confusion: np.ndarray, share: np.ndarray) -> None:
    cell = 300 / len(confusion)  # points, a little less than a cell is wide
    size = min(13.0, 0.95 * cell / (0.62 * len(str(confusion.max()))))
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            color = "white" if share[row, column] > 0.68 else "black"
            ax.text(column, row, str(count), color=color, fontsize=size, ha="center", va="center")


def _draw_pictures(
    figure: "SubFigure", pictures: Sequence[Picture], names: list[str], rows: int
) -> None:
    from vit_jax.data.pictures import shrink

    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax in axes[len(pictures) :]:
        ax.axis("off")
    for ax, (image, truth, predicted, probability) in zip(axes, pictures, strict=False):
        gray = image.shape[-1] == 1
        small = shrink(image, 512)  # matplotlib makes floats of all that it gets
        pixels = small[..., 0] if gray else small
        smooth = "nearest" if max(image.shape[:2]) < TINY else "antialiased"
        ax.imshow(pixels, cmap="gray" if gray else None, vmin=0, vmax=255, interpolation=smooth)
        color = RIGHT if truth == predicted else WRONG
        caption = _caption(names, truth, predicted, probability)
        ax.set_title(caption, fontsize=9.5, color=color, parse_math=False)
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.spines[:].set(color=color, linewidth=2)


def _caption(names: list[str], truth: int, predicted: int, probability: float) -> str:
    """What the model says of a picture, in one line or, where the names are long, two."""
    said, width = names[predicted], CAPTION_CHARS
    comma, rest = (
        ("", f"({probability:.0%})") if truth == predicted else (",", f"not {names[truth]}")
    )
    line = f"{said}{comma} {rest}"
    if len(line) <= width:
        return line
    return f"{_elide(said, width - len(comma))}{comma}\n{_elide(rest, width)}"


def _elide(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
