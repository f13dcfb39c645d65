"""The drawings of a report: curves, confusion matrix, classes and calibration.

Drawn with matplotlib's objects alone: no pyplot, no window, no state left behind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.evaluation.calibration import Calibration
from vit_jax.evaluation.metrics import Scores
from vit_jax.page import elide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Points = list[tuple[int, float]]

# Okabe & Ito's palette, told apart with any colour vision; green and red are darkened to be read.
TRAIN, TEST, RATE, RIGHT, WRONG = "#0072B2", "#D55E00", "#777777", "#00694B", "#B3261E"
COUNTED_CLASSES = 15  # with more, counts in the cells could not be read
NAMED_CLASSES = 40  # with more, only some classes are named on the axes
SHORT = 3  # letters, with which names need not be turned
LISTED_CLASSES = 15  # whose recall and precision have room


def panels(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Callable[["Axes"], None]]:
    """What draws each of a run's curves, by their names; those without a finite point are left out.

    Args:
      metrics: records of metrics.jsonl, each with "step" and any of "train/loss", "test/loss",
        "train/lr", "test/top1" (a fraction), "time/images_per_s".
    """
    keys = ("train/loss", "test/loss", "test/top1", "train/lr", "time/images_per_s")
    train, test, top1, rates, speeds = (_points(metrics, key) for key in keys)
    last = max((x for points in (train, test, top1, rates, speeds) for x, _ in points), default=1)
    drawn: dict[str, Callable[[Axes], None]] = {
        "loss": lambda ax: _draw_loss(ax, train, test),
        "accuracy": lambda ax: _draw_accuracy(ax, top1),
        "learning rate": lambda ax: _draw_single(ax, rates, "Learning rate", "{:.2g}"),
        "throughput": lambda ax: _draw_single(ax, speeds, "Training: images a second", "{:,.0f}"),
    }
    there = dict(zip(drawn, (train or test, top1, rates, speeds), strict=True))

    def whole(draw: Callable[["Axes"], None]) -> Callable[["Axes"], None]:
        def panel(ax: "Axes") -> None:
            draw(ax)
            _draw_steps(ax, last)

        return panel

    return {name: whole(draw) for name, draw in drawn.items() if there[name]}


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The (step, value) points of one scalar, without what is no number."""
    points = [(record["step"], record[key]) for record in metrics if key in record]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _draw_steps(ax: "Axes", last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_xlim(0, max(last, 1) * 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def _draw_loss(ax: "Axes", train: Points, test: Points) -> None:
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
        ax.set_ylim(min(0, min(values)), 1.05 * max(values) if max(values) > 0 else None)
    ax.set_title("Loss (nats)", fontsize=11, loc="left")
    # Above the panel, where no curve can run through it.
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2, frameon=False)


def _draw_accuracy(ax: "Axes", top1: Points) -> None:
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


def _draw_single(ax: "Axes", points: Points, title: str, form: str) -> None:
    steps, values = zip(*points, strict=True)
    ax.plot(steps, values, color=RATE, linewidth=1.2, marker="o" if len(steps) == 1 else "")
    ax.set_yticks(sorted({0.0, max(values)}))
    ax.set_ylim(0, 1.1 * max(values) or 1)
    ax.yaxis.set_major_formatter(lambda value, _: form.format(value))
    ax.set_title(title, fontsize=10, loc="left")


def draw_confusion(figure: "FigureBase", confusion: np.ndarray, names: Sequence[str]) -> None:
    """The confusion matrix as shares of the true classes, with counts where there is room."""
    ax = figure.subplots()
    k, total = len(names), int(confusion.sum())
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", norm=_color_scale(k), interpolation_stage="data")
    shown = range(0, k, math.ceil(k / NAMED_CLASSES))
    size = min(10.0, max(5.5, 260 / len(shown)))
    ticks = [elide(names[i], 22) for i in shown]
    turned = 0 if max(map(len, ticks)) <= SHORT and k <= COUNTED_CLASSES else 90 if k > 10 else 45
    ax.set_xticks(shown, ticks, fontsize=size, rotation=turned, parse_math=False)
    ax.set_yticks(shown, ticks, fontsize=size, parse_math=False)
    if turned == 45:
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


def draw_reliability(figure: "FigureBase", calibration: Calibration) -> None:
    """How often predictions of each confidence are right, and below how many there are."""
    bins = len(calibration.count)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = np.arange(bins) / bins, 0.94 / bins
    upper.plot([0, 1], [0, 1], color=RATE, linewidth=1.2, linestyle="--")
    upper.bar(left, np.nan_to_num(calibration.accuracy), width, align="edge", color=TRAIN)
    # Without a bar to stand on, where all of a bin's predictions are wrong.
    upper.plot(calibration.confidence, calibration.accuracy, "o", color=TEST, markersize=4)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="right")
    error = f"{calibration.error:.1%}" if calibration.count.any() else "unknown"
    upper.set_title(f"Calibration: expected error {error}", fontsize=11, loc="left")
    lower.bar(
        left, calibration.count / max(calibration.count.sum(), 1), width, align="edge", color=RATE
    )
    lower.set(xlabel="confidence", ylabel="images")
    for ax in (upper, lower):
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)


def draw_classes(ax: "Axes", scores: Scores, names: Sequence[str]) -> None:
    """Recall and precision of each class, least recall first; of many classes the first ones."""
    there = np.flatnonzero(scores.confusion.sum(axis=1))
    worst = there[np.argsort(scores.per_class[there], kind="stable")][:LISTED_CLASSES]
    rows = np.arange(len(worst))
    (recall,) = ax.plot(scores.per_class[worst], rows, "o", color=TRAIN, label="recall")
    (precision,) = ax.plot(scores.precision[worst], rows, "D", color=TEST, label="precision")
    precision.set(markerfacecolor="none")
    for line in (recall, precision):
        line.set(clip_on=False, in_layout=False)  # Lines without a point would upset the layout.
    ticks = [elide(names[i], 18) for i in worst]
    ax.set_yticks(rows, ticks, fontsize=9, parse_math=False)
    ax.set(xlim=(0, 1), ylim=(max(len(worst), 1) - 0.5, -0.5))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(alpha=0.25)
    some = len(worst) < len(there)
    text = f"Worst of {len(there):,} classes" if some else "Classes"
    ax.set_title(text, fontsize=11, loc="left", pad=18)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2, frameon=False)
