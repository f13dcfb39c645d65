"""A report of a training run: what it shows, and one image (report.png) that shows it."""

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

from vit_jax import __version__
from vit_jax.data import Source
from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.plots import (
    RIGHT,
    WRONG,
    draw_classes,
    draw_confusion,
    draw_reliability,
    panels,
)
from vit_jax.files import atomic_write
from vit_jax.page import TINY, elide, kind_of, png
from vit_jax.sharding import device_kinds

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

MAX_MISTAKES = 24  # images on a page
PIXELS = 320  # of an image's longer side, to be looked at
MAX_IMAGES, COLUMNS = 12, 6  # of report.png
CAPTION_CHARS = 26  # what fits above an image
SETTINGS_LINES, SETTINGS_CHARS = 24, 58  # with room for a note below
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


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
      metrics: records of metrics.jsonl; see `plots.panels`.
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
    chosen = [*wrong, *right[np.linspace(0, len(right) - 1, count).astype(int)]]
    examples = []
    for i in chosen:
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
    if kind_of(path) == "html":
        from vit_jax.evaluation.report_page import page_of

        content = page_of(report)
    else:
        content = png(draw_report(report))
    with atomic_write(path) as file:
        file.write(content)


def draw_report(report: Report) -> "Figure":
    """The report as one figure: curves and confusion matrix; calibration, classes and settings;
    some images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [" ".join(str(label).split()) for label in report.labels]
    wrong = [e for e in report.examples if not e.right][: MAX_IMAGES // 2]
    examples = [*wrong, *(e for e in report.examples if e.right)][:MAX_IMAGES]
    rows = math.ceil(len(examples) / COLUMNS)

    heights = [7.0, 4.2, *([2.5 * rows] if rows else [])]
    figure = Figure(figsize=(14, sum(heights) + 0.7), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    headline = textwrap.shorten(report.title, 110, placeholder=" ...")
    figure.suptitle(headline, fontsize=15, fontweight="bold", parse_math=False)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curves, settings = parts[0], parts[1]
    if report.scores:
        curves, right = parts[0].subfigures(1, 2, width_ratios=[1, 1.15])
        left, middle, settings = parts[1].subfigures(1, 3, width_ratios=[1, 1.15, 1.15])
        draw_confusion(right, report.scores.confusion, names)
        draw_reliability(left, report.scores.calibration)
        draw_classes(middle.subplots(), report.scores, names)
    _draw_curves(curves, report.metrics)
    _write_settings(settings, report)
    if rows:
        _draw_images(parts[2], examples, rows)
    return figure


def _draw_curves(figure: "SubFigure", metrics: Sequence[Mapping[str, Any]]) -> None:
    """One above the other, over the same steps."""
    curves = panels(metrics)
    if not curves:
        return
    heights = [3.0 if name in ("loss", "accuracy") else 1.0 for name in curves]
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for draw, ax in zip(curves.values(), axes, strict=True):
        draw(ax)
    axes[-1].set_xlabel("step")


def _write_settings(figure: "SubFigure", report: Report) -> None:
    """What was not left at its default, and what it ran on."""
    lines = [f"{k.removeprefix('config.')} = {v}" for k, v in report.changed.items()]
    room = SETTINGS_LINES - len(report.environment) - 2
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {len(lines) - room + 1} more"]
    lines += ["", *(f"{k} {v}" for k, v in report.environment.items())]
    ax = figure.subplots()
    ax.axis("off")
    ax.set_title("Configuration, where not by default", fontsize=11, loc="left")
    shown = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    note = textwrap.wrap(report.note, SETTINGS_CHARS)[:3]
    text = "\n".join([*(elide(line, SETTINGS_CHARS) for line in shown), "", *note])
    drawn = ax.text(0, 1, text, transform=ax.transAxes, family="monospace", fontsize=7.5, va="top")
    drawn.set(parse_math=False, in_layout=False)


def _draw_images(figure: "SubFigure", examples: Sequence[Example], rows: int) -> None:
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax in axes[len(examples) :]:
        ax.axis("off")
    for ax, example in zip(axes, examples, strict=False):
        gray = example.image.shape[-1] == 1
        pixels = example.image[..., 0] if gray else example.image
        smooth = "nearest" if max(pixels.shape[:2]) < TINY else "antialiased"
        ax.imshow(pixels, cmap="gray" if gray else None, vmin=0, vmax=255, interpolation=smooth)
        color = RIGHT if example.right else WRONG
        ax.set_title(_caption(example), fontsize=9.5, color=color, parse_math=False)
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.spines[:].set(color=color, linewidth=2)


def _caption(example: Example) -> str:
    """What the model says of an image, in one line or, where the names are long, two."""
    said, truth = (" ".join(name.split()) for name in (example.prediction, example.truth))
    sure = f" ({example.probability:.0%})"
    line = f"{said}{sure}" if example.right else f"{said}{sure}, not {truth}"
    if len(line) <= CAPTION_CHARS:
        return line
    rest = "" if example.right else f"\n{elide(f'not {truth}', CAPTION_CHARS)}"
    return elide(said, CAPTION_CHARS - len(sure)) + sure + rest
