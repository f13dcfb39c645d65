"""A report of a training run: as a page, report.html, and as an image, report.png."""

import dataclasses
import math
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vit_jax import __version__, page
from vit_jax.data import Source
from vit_jax.escape import printable
from vit_jax.evaluation.metrics import BINS, THRESHOLD_RULE, Calibration, Scores
from vit_jax.files import atomic_write
from vit_jax.page import BLUE, GREY, ORANGE, elide, new_figure, styled
from vit_jax.sharding import device_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

MAX_MISTAKES = 24  # images on a page
PIXELS = 320  # of an image's longer side, to be looked at
MAX_IMAGES, COLUMNS = 12, 6  # of report.png
CAPTION_CHARS = 26  # what fits above an image
SETTINGS_LINES, SETTINGS_CHARS = 24, 58  # with room for a note below
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
CONFUSIONS = 20  # how many pairs of classes are listed
RIGHT, WRONG = "#00694B", "#B3261E"  # green and red, dark enough to be read
COUNTED_CLASSES = 15  # with more, counts in the cells could not be read
NAMED_CLASSES = 40  # with more, only some classes are named on the axes
TABLE_CLASSES = 20  # with more, the page has an image whose cells can be asked
SHORT = 3  # letters, with which names need not be turned
LISTED_CLASSES = 15  # whose recall and precision have room

Points = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A test image and what the network says of it.

    Attributes:
      image: uint8 (h, w, 1 or 3), at most PIXELS a side.
      name: of the image, e.g. its path.
      truth: the name of its class, or of several.
      prediction, probability: of the likeliest class.
      right: whether that is true.
    """

    image: np.ndarray
    name: str
    truth: str
    prediction: str
    probability: float
    right: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
      title: headline, such as the model and the data set.
      metrics: records of metrics.jsonl; see `_curves`.
      labels: the class names.
      scores: on the test images, or None if there are no weights to evaluate.
      examples: see `choose_examples`.
      config: the fields of the configuration by their full names; defaults: likewise.
      environment: see `environment`.
      multi_label: whether an image may have several classes.
      note: what else is to be said.
    """

    title: str
    metrics: Sequence[Mapping[str, Any]]
    labels: Sequence[str]
    scores: Scores | None
    examples: Sequence[Example]
    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    environment: Mapping[str, str]
    multi_label: bool = False
    note: str = ""

    @property
    def changed(self) -> dict[str, Any]:
        """The fields of the configuration that are not as by default."""
        return {k: v for k, v in self.config.items() if v != self.defaults.get(k)}


def environment() -> dict[str, str]:
    """What computes here: {"jax": "0.10.2", ..., "devices": "1 x cpu", ...}."""
    return {
        "vit_jax": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
        "Python": platform.python_version(),
        "system": platform.platform(),
        "devices": device_kinds(),
        "processes": str(jax.process_count()),
    }


def choose_examples(scores: Scores, source: Source) -> list[Example]:
    """The most confident mistakes, first of all, and successes from all over the set to fill up
    an image.

    Args:
      scores: of a network with the classes of the source.
      source: of the images that were scored. Of an image without a class nothing is a mistake.
    """
    from vit_jax.data.images import shrink

    wrong = np.flatnonzero((scores.truth != scores.prediction) & (scores.truth >= 0))
    right = np.flatnonzero(scores.truth == scores.prediction)
    wrong = wrong[np.argsort(-scores.probability[wrong], kind="stable")][:MAX_MISTAKES]
    count = min(MAX_IMAGES - min(len(wrong), MAX_IMAGES // 2), len(right))
    examples = []
    for i in (*wrong, *right[np.linspace(0, len(right) - 1, count).astype(int)]):
        index, truth = int(scores.index[i]), int(scores.truth[i])
        stored = source[index]
        true = np.flatnonzero(stored["label"]) if source.multi_label else [truth]
        examples.append(
            Example(
                shrink(stored["image"], PIXELS),
                source.describe(index),
                ", ".join(source.labels[j] for j in true),
                source.labels[scores.prediction[i]],
                float(scores.probability[i]),
                truth == scores.prediction[i],
            )
        )
    return examples


def write_report(report: Report, path: str | os.PathLike) -> None:
    """Writes a report as a page or an image, as the name's ending says, whole or not at all.

    Raises UserError for another ending, or if the file can't be written.
    """
    html = page.kind_of(path) == "html"
    content = _page(report) if html else page.png(draw_report(report))
    with atomic_write(path) as file:
        file.write(content)


@styled
def _page(report: Report) -> bytes:
    scores, labels, curves = report.scores, report.labels, {}
    for name in _curves(report.metrics):
        curves[name] = new_figure(4, 2.4)  # As wide as a phone: there it has its own size.
        _draw_curve(curves[name].subplots(), name, report.metrics)
        curves[name].axes[0].set_xlabel("step")
    if scores is None:
        return page.render("report", report.title, report=report, scores=None, curves=curves)
    counts, share = scores.confusion, _row_shares(scores.confusion)
    off = np.where(np.eye(len(labels), dtype=bool), 0, counts)
    worst = np.argsort(-off, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(i), len(labels)) for i in worst if off.flat[i]]
    there = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1)).tolist()
    columns = (counts.sum(axis=1), scores.per_class, scores.precision)
    calibration, reliability = scores.calibration, new_figure(4, 3.6)
    _draw_reliability(reliability, calibration)
    bins = (calibration.count, calibration.confidence, calibration.accuracy)
    ends = [f"{100 * m / BINS:.0f}\u2011{(m + 1) / BINS:.0%}" for m in range(BINS)]
    return page.render(
        "report",
        report.title,
        report=report,
        scores=scores,
        curves=curves,
        share=share,
        short=max(map(len, labels), default=0) <= SHORT,
        matrix=_matrix(labels, counts, there) if len(labels) > TABLE_CLASSES else None,
        confusions=[
            (labels[r], labels[c], int(counts[r, c]), float(share[r, c])) for r, c in pairs
        ],
        classes=[(labels[i], *(column[i].item() for column in columns)) for i in there],
        by_label=_label_rows(scores, labels),
        threshold_rule=THRESHOLD_RULE,
        calibration=calibration,
        bins=[(end, *(b[i].item() for b in bins)) for i, end in enumerate(ends) if bins[0][i]],
        reliability=reliability,
        mistakes=[e for e in report.examples if not e.right],
        total=int(((scores.truth != scores.prediction) & (scores.truth >= 0)).sum()),
    )


def _label_rows(scores: Scores, labels: Sequence[str]) -> list[tuple[Any, ...]]:
    """A row for each label that an image has, where it may have several."""
    found = scores.by_label
    if found is None:
        return []
    columns = (found.count, found.average_precision, found.f1, found.threshold, found.best_f1)
    there = np.flatnonzero(found.count).tolist()
    return [(labels[i], *(column[i].item() for column in columns)) for i in there]


def _matrix(labels: Sequence[str], counts: np.ndarray, there: Sequence[int]) -> dict[str, Any]:
    """The confusion matrix of many classes as an image, and what report.js has to know of it; of
    those that occur: of 1,000 classes and few images, each cell can still be seen."""
    counts = counts[np.ix_(there, there)]
    # A square root, so that rare mistakes are seen; what is transparent has the page's colour.
    pixels = np.full((*counts.shape, 4), (40, 125, 215, 0), np.uint8)
    pixels[..., 3] = np.ceil(255 * np.sqrt(_row_shares(counts)))
    rows = [{int(c): int(row[c]) for c in np.flatnonzero(row)} for row in counts]
    return {"pixels": pixels, "data": {"names": [labels[i] for i in there], "counts": rows}}


def _row_shares(counts: np.ndarray) -> np.ndarray:
    """A confusion matrix as shares of the true classes."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@styled
def draw_report(report: Report) -> "Figure":
    """The report as one figure: curves and confusion matrix; calibration, classes and settings;
    some images."""
    names = [printable(" ".join(label.split())) for label in report.labels]
    wrong = [e for e in report.examples if not e.right][: MAX_IMAGES // 2]
    examples = [*wrong, *(e for e in report.examples if e.right)][:MAX_IMAGES]
    rows = math.ceil(len(examples) / COLUMNS)
    heights = [7.0, 4.2, *([2.5 * rows] if rows else [])]
    figure = new_figure(14, sum(heights) + 0.7)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    headline = printable(textwrap.shorten(report.title, 110, placeholder=" ..."))
    figure.suptitle(headline, fontsize=15, fontweight="bold")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curves, settings = parts[0], parts[1]
    if report.scores:
        curves, right = parts[0].subfigures(1, 2, width_ratios=[1, 1.15])
        left, middle, settings = parts[1].subfigures(1, 3, width_ratios=[1, 1.15, 1.15])
        _draw_confusion(right, report.scores.confusion, names)
        _draw_reliability(left, report.scores.calibration)
        _draw_classes(middle.subplots(), report.scores, names)
    if names_of_curves := list(_curves(report.metrics)):
        ratios = [3.0 if name in ("loss", "accuracy") else 1.0 for name in names_of_curves]
        axes = curves.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
        for name, ax in zip(names_of_curves, axes[:, 0], strict=True):
            _draw_curve(ax, name, report.metrics)
        axes[-1, 0].set_xlabel("step")
    _write_settings(settings.subplots(), report)
    if rows:
        _draw_images(parts[2].subplots(rows, COLUMNS, squeeze=False).ravel(), examples)
    return figure


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Points]]:
    """The lines of each of a run's curves, by its name; curves without a finite point are left out.

    Args:
      metrics: records of metrics.jsonl, each with "step" and any of the keys below.
    """
    keys = {
        "loss": ("train/loss", "test/loss"),
        "accuracy": ("test/top1",),  # a fraction
        "learning rate": ("train/lr",),
        "throughput": ("time/images_per_s",),
    }

    def points(key: str) -> Points:
        found = [(record["step"], record[key]) for record in metrics if key in record]
        return [(step, value) for step, value in found if math.isfinite(value)]

    curves = {name: [points(key) for key in lines] for name, lines in keys.items()}
    return {name: lines for name, lines in curves.items() if any(lines)}


def _draw_curve(ax: "Axes", name: str, metrics: Sequence[Mapping[str, Any]]) -> None:
    """One of `_curves`, over the steps of all of them."""
    from matplotlib.ticker import MaxNLocator

    curves = _curves(metrics)
    if name == "loss":
        _draw_loss(ax, *curves[name])
    elif name == "accuracy":
        _draw_accuracy(ax, *curves[name])
    elif name == "learning rate":
        _draw_single(ax, curves[name][0], "Learning rate", "{x:.2g}")
    else:
        _draw_single(ax, curves[name][0], "Training: images a second", "{x:,.0f}")
    last = max(step for lines in curves.values() for points in lines for step, _ in points)
    ax.grid()
    ax.set_xlim(0, max(last, 1) * 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _draw_loss(ax: "Axes", train: Points, test: Points) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for points, name, color in ((train, "train", BLUE), (test, "test", ORANGE)):
        if points:
            (line,) = ax.plot(*zip(*points, strict=True), color=color, label=name)
            if name == "test" or len(points) == 1:  # Without a mark one point cannot be seen.
                line.set(marker="o", markersize=4, clip_on=False)
    values = [value for _, value in (*train, *test)]
    if min(values) > 0 and max(values) / min(values) > 50:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(min(0, min(values)), 1.05 * max(values) if max(values) > 0 else None)
    ax.set_title("Loss (nats)")
    # Above the panel, where no curve can run through it.
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)


def _draw_accuracy(ax: "Axes", top1: Points) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = zip(*((step, 100 * value) for step, value in top1), strict=True)
    best = int(np.argmax(values))
    ax.plot(steps, values, color=ORANGE, marker="o", markersize=4, clip_on=False)
    pad = max(4.0, 0.1 * (max(values) - min(values)))
    ax.set_ylim(max(0.0, min(values) - pad), min(100.5, max(values) + pad))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.yaxis.set_major_formatter("{x:g}%")
    text = f"Test accuracy: {values[-1]:.1f}% at the end"
    if values[best] > values[-1]:
        text += f", best {values[best]:.1f}% at step {steps[best]:,}"
    ax.set_title(text)


def _draw_single(ax: "Axes", points: Points, title: str, form: str) -> None:
    steps, values = zip(*points, strict=True)
    ax.plot(steps, values, color=GREY, linewidth=1.2, marker="o" if len(steps) == 1 else "")
    ax.set_yticks(sorted({0.0, max(values)}))
    ax.set_ylim(0, 1.1 * max(values) or 1)
    ax.yaxis.set_major_formatter(form)
    ax.set_title(title, fontsize=10)


def _draw_confusion(figure: "FigureBase", counts: np.ndarray, names: Sequence[str]) -> None:
    """The confusion matrix as shares of the true classes, with counts where there is room."""
    from matplotlib.colors import PowerNorm

    ax = figure.subplots()
    k, total, right = len(names), int(counts.sum()), int(np.trace(counts))
    share = _row_shares(counts)
    # Linear where the counts can be read; else a square root, so that rare mistakes are seen.
    scale = PowerNorm(1 if k <= COUNTED_CLASSES else 0.5, 0, 1)
    image = ax.imshow(share, cmap="Blues", interpolation_stage="data", norm=scale)
    ax.spines[:].set_visible(True)
    shown = range(0, k, math.ceil(k / NAMED_CLASSES))
    size = min(10.0, max(5.5, 260 / len(shown)))
    ticks = [elide(names[i], 22) for i in shown]
    turned = 0 if max(map(len, ticks)) <= SHORT and k <= COUNTED_CLASSES else 90 if k > 10 else 45
    ax.set_xticks(shown, ticks, fontsize=size, rotation=turned)
    ax.set_yticks(shown, ticks, fontsize=size)
    if turned == 45:
        for label in ax.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_title(f"Confusion matrix: {right:,} of {total:,} right ({right / max(total, 1):.1%})")
    if k > COUNTED_CLASSES:
        bar = figure.colorbar(image, ax=ax, shrink=0.6, fraction=0.04, pad=0.02, format="{x:.0%}")
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        return
    cell = 300 / k  # points, a little less than a cell is wide
    size = min(13.0, 0.95 * cell / (0.62 * len(str(counts.max()))))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[row, column] > 0.68 else "black"
            ax.text(column, row, str(count), color=color, fontsize=size, ha="center", va="center")


def _draw_reliability(figure: "FigureBase", calibration: Calibration) -> None:
    """How often predictions of each confidence are right, and below how many there are."""
    count, accuracy = calibration.count, calibration.accuracy
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = np.arange(len(count)) / len(count), 0.94 / len(count)
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1.2, linestyle="--")
    upper.bar(left, np.nan_to_num(accuracy), width, align="edge", color=BLUE)
    # Without a bar to stand on, where all of a bin's predictions are wrong.
    upper.plot(calibration.confidence, accuracy, "o", color=ORANGE, markersize=4)
    error = f"{calibration.error:.1%}" if count.any() else "unknown"
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="right")
    upper.set_title(f"Calibration: expected error {error}")
    lower.bar(left, count / max(count.sum(), 1), width, align="edge", color=GREY)
    lower.set(xlabel="confidence", ylabel="images")
    for ax in (upper, lower):
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.yaxis.set_major_formatter("{x:.0%}")
        ax.grid()
        ax.set_axisbelow(True)


def _draw_classes(ax: "Axes", scores: Scores, names: Sequence[str]) -> None:
    """Recall and precision of each class, least recall first; of many classes the first ones."""
    there = np.flatnonzero(scores.confusion.sum(axis=1))
    worst = there[np.argsort(scores.per_class[there], kind="stable")][:LISTED_CLASSES]
    rows = np.arange(len(worst))
    # Lines without a point would upset the layout.
    options: dict[str, Any] = dict(clip_on=False, in_layout=False, linestyle="")
    ax.plot(scores.per_class[worst], rows, marker="o", color=BLUE, label="recall", **options)
    options |= dict(markerfacecolor="none", label="precision")
    ax.plot(scores.precision[worst], rows, marker="D", color=ORANGE, **options)
    ax.set_yticks(rows, [elide(names[i], 18) for i in worst], fontsize=9)
    ax.set(xlim=(0, 1), ylim=(max(len(worst), 1) - 0.5, -0.5))
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.spines["left"].set_visible(False)
    ax.grid()
    some = len(worst) < len(there)
    ax.set_title(f"Worst of {len(there):,} classes" if some else "Classes", pad=18)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)


def _write_settings(ax: "Axes", report: Report) -> None:
    """What was not left at its default, and what it ran on."""
    lines = [f"{k.removeprefix('config.')} = {v}" for k, v in report.changed.items()]
    room = SETTINGS_LINES - len(report.environment) - 2
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {len(lines) - room + 1} more"]
    lines += ["", *(f"{k} {v}" for k, v in report.environment.items())]
    note = textwrap.wrap(report.note, SETTINGS_CHARS)[:3]
    text = "\n".join([*(elide(line, SETTINGS_CHARS) for line in lines), "", *note])
    ax.axis("off")
    ax.set_title("Configuration, where not by default")
    drawn = ax.text(0, 1, text, transform=ax.transAxes, family="monospace", fontsize=7.5, va="top")
    drawn.set_in_layout(False)


def _draw_images(axes: Sequence["Axes"], examples: Sequence[Example]) -> None:
    for ax in axes[len(examples) :]:
        ax.axis("off")
    for ax, example in zip(axes, examples, strict=False):
        gray = example.image.shape[-1] == 1
        pixels = example.image[..., 0] if gray else example.image
        smooth = "nearest" if max(pixels.shape[:2]) < page.TINY else "antialiased"
        ax.imshow(pixels, cmap="gray" if gray else None, vmin=0, vmax=255, interpolation=smooth)
        color = RIGHT if example.right else WRONG
        ax.set_title(_caption(example), loc="center", fontsize=9.5, color=color)
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.spines[:].set(color=color, linewidth=2, visible=True)


def _caption(example: Example) -> str:
    """What the model says of an image, in one line or, where the names are long, two."""
    names = (example.prediction, example.truth)
    said, truth = (printable(" ".join(name.split())) for name in names)
    sure = f" ({example.probability:.0%})"
    line = f"{said}{sure}" if example.right else f"{said}{sure}, not {truth}"
    if len(line) <= CAPTION_CHARS:
        return line
    rest = "" if example.right else f"\n{elide(f'not {truth}', CAPTION_CHARS)}"
    return elide(said, CAPTION_CHARS - len(sure)) + sure + rest
