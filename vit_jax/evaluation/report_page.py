"""A report as a page of HTML that stands alone: report.html."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax import page
from vit_jax.evaluation.calibration import BINS
from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.plots import SHORT, draw_reliability, panels
from vit_jax.evaluation.report import Example, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_CLASSES = 20  # with more, the confusion matrix is an image whose cells can be asked
CONFUSIONS = 20  # how many pairs of classes are listed

_STYLE = """
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .6rem }
dl.tiles div { background: var(--soft); border-radius: .4rem; padding: .5rem .7rem }
dl.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600 } dl.tiles dt { color: var(--dim) }
.matrix td { text-align: center; border: 1px solid var(--line) }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  position: static; vertical-align: bottom }
.matrix thead th:first-child, .short thead th { writing-mode: initial; transform: none }
@media (max-width: 30rem) { .matrix td, .matrix th { padding: .2rem .15rem } }
.wide:has(.cells) { max-height: none }
.cells { position: relative; cursor: crosshair; border: 1px solid var(--line) }
.cells img { width: 100%; max-width: none; image-rendering: pixelated }
.cells i { position: absolute; outline: 2px solid var(--bad); display: none; pointer-events: none }
output { display: block; min-height: 1.5em } .images img { max-height: 14rem; object-fit: contain;
  width: 100%; background: var(--soft) } td.text { text-align: left }
summary { cursor: pointer; margin: .6rem 0 } .settings td { overflow-wrap: anywhere }
.settings th { font-weight: normal; color: var(--dim) }
"""

# Says what a cell of the matrix means, under the pointer or by the arrow keys.
_SCRIPT = """
const cells = document.querySelector(".cells");
if (cells) {
  const { names, counts } = JSON.parse(document.getElementById("confusion").textContent);
  const k = names.length, mark = cells.querySelector("i"), said = document.querySelector("output");
  const total = row => Object.values(counts[row]).reduce((a, b) => a + b, 0);
  let row = 0, column = 0;
  const show = (r, c) => {
    row = Math.min(Math.max(r, 0), k - 1), column = Math.min(Math.max(c, 0), k - 1);
    Object.assign(mark.style, { display: "block", width: 100 / k + "%", height: 100 / k + "%",
      left: 100 * column / k + "%", top: 100 * row / k + "%" });
    said.textContent = `${counts[row][column] || 0} of ${total(row)} images of ${names[row]} `
      + `are said to be ${names[column]}.`;
  };
  const point = event => {
    const box = cells.querySelector("img").getBoundingClientRect();
    show(Math.floor((event.clientY - box.top) / box.height * k),
      Math.floor((event.clientX - box.left) / box.width * k));
  };
  cells.onpointermove = cells.onpointerdown = point;
  cells.onfocus = () => show(row, column);
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  cells.onkeydown = event => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    show(row + move[0], column + move[1]);
  };
}
"""


def page_of(report: Report) -> bytes:
    """The page: summary, curves, confusion matrix, classes, calibration, mistakes, settings."""
    note = f"<p><strong>{page.escape(report.note)}</strong></p>" if report.note else ""
    parts = [note, _curves(report.metrics)]
    if report.scores:
        parts = [_summary(report.scores), *parts, _confusion(report, report.scores.confusion)]
        parts += [_classes(report.scores, report.labels), _calibration(report.scores)]
        parts += [_mistakes(report.scores, [e for e in report.examples if not e.right])]
    parts += [_settings(report)]
    return page.document(report.title, "\n".join(parts), style=_STYLE, script=_SCRIPT)


def _summary(scores: Scores) -> str:
    tiles = {
        "top-1 accuracy": f"{scores.top1:.1%}",
        "top-5 accuracy": f"{scores.top5:.1%}",
        "loss in nats": f"{scores.loss:.4f}",
        "calibration error": f"{scores.calibration.error:.1%}",
        "test images": f"{scores.count:,}",
        "unreadable, left out": f"{scores.skipped:,}" if scores.skipped else "",
    }
    rows = (f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles.items() if v)
    return f'<dl class="tiles">{"".join(rows)}</dl>'


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    drawn = ""
    for name, draw in panels(metrics).items():
        figure = _figure(2.4)
        ax = figure.subplots()
        draw(ax)
        ax.set_xlabel("step")
        drawn += f"<figure>{page.drawing(figure, f'Curve: {name} by step')}</figure>"
    return f'<h2>Curves</h2><div class="grid">{drawn}</div>' if drawn else ""


def _figure(height: float) -> "Figure":
    """As wide as a phone: there it is shown in its own size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, height))
    figure.set_layout_engine("constrained")
    return figure


def _confusion(report: Report, counts: np.ndarray) -> str:
    labels = report.labels
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    several = (
        " Of an image's several classes the likeliest counts as the true one."
        if report.multi_label
        else ""
    )
    few = len(labels) <= TABLE_CLASSES
    matrix, column = (_table_matrix, "30rem") if few else (_image_matrix, "100%")
    off = np.where(np.eye(len(labels), dtype=bool), 0, counts)
    worst = np.argsort(-off, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(i), len(labels)) for i in worst if off.flat[i]]
    rows = [(labels[r], labels[c], int(counts[r, c]), float(share[r, c])) for r, c in pairs]
    heads = ("true class", "predicted", "images", "share")
    listed = page.table(heads, rows, name="Most frequent confusions") if rows else "<p>None.</p>"
    return (
        f'<div class="grid" style="--column: {column}"><section><h2>Confusion matrix</h2>'
        f"<p class=dim>True classes in the rows, predicted ones in the columns.{several}</p>"
        f"{matrix(counts, share, labels)}</section><section><h2>Most frequent confusions</h2>"
        f"{listed}</section></div>"
    )


def _table_matrix(counts: np.ndarray, share: np.ndarray, labels: Sequence[str]) -> str:
    names = [page.escape(label) for label in labels]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    css = "matrix short" if max(map(len, labels)) <= SHORT else "matrix"
    rows = []
    for name, row, shares in zip(names, counts.tolist(), share.tolist(), strict=True):
        cells = (
            f'<td style="background: rgba(var(--cell), {0.55 * x:.2f})">{n or ""}</td>'
            for n, x in zip(row, shares, strict=True)
        )
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Confusion matrix">'
        f'<table class="{css}"><thead><tr><th scope="col">true</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _image_matrix(counts: np.ndarray, share: np.ndarray, labels: Sequence[str]) -> str:
    # Those that occur: of 1,000 classes and few images, each cell can still be seen.
    there = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    counts, share = counts[np.ix_(there, there)], share[np.ix_(there, there)]
    k = len(there)
    # A square root, so that rare mistakes are seen; what is transparent has the page's colour.
    pixels = np.full((k, k, 4), (40, 125, 215, 0), np.uint8)
    pixels[..., 3] = np.ceil(255 * np.sqrt(share))
    rows = [{int(c): int(row[c]) for c in np.flatnonzero(row)} for row in counts]
    alt = f"Confusion matrix of {k} classes. The arrow keys move over its cells."
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Confusion matrix">'
        f'<div class="cells" style="min-width: {k}px" tabindex="0" role="group" '
        f'aria-label="{alt}">{page.image(pixels, alt)}<i></i></div></div>'
        '<output aria-live="polite">Point at a cell, or move over them by the arrow keys.</output>'
        + page.data("confusion", {"names": [labels[i] for i in there.tolist()], "counts": rows})
    )


def _classes(scores: Scores, labels: Sequence[str]) -> str:
    rows, empty = [], 0
    counts, said = (scores.confusion.sum(axis=axis).tolist() for axis in (1, 0))
    for i, label in enumerate(labels):
        if counts[i] or said[i]:
            shares = float(scores.per_class[i]), float(scores.precision[i])
            rows.append((label, counts[i], *shares))
        else:
            empty += 1
    rest = f" {empty:,} classes have no image and were never predicted." if empty else ""
    heads = ("class", "images", "recall", "precision")
    return (
        "<h2>Classes</h2><p class=dim>Recall (the accuracy of a class) is the share of its "
        "images that are found, precision the share of its predictions that are right."
        f"{rest}</p>{page.table(heads, rows, name='Classes', sortable=True)}"
    )


def _calibration(scores: Scores) -> str:
    calibration = scores.calibration
    ends = [f"{100 * m / BINS:.0f}\u2011{(m + 1) / BINS:.0%}" for m in range(BINS)]
    values = zip(
        ends,
        calibration.count.tolist(),
        calibration.confidence.tolist(),
        calibration.accuracy.tolist(),
        strict=True,
    )
    heads = ("bin", "images", "confidence", "right")
    table = page.table(heads, [row for row in values if row[1]], name="Calibration")
    alt = f"Reliability diagram; expected calibration error {calibration.error:.1%}"
    figure = _figure(3.6)
    draw_reliability(figure, calibration)
    return (
        f"<h2>Calibration</h2><p class=dim>How often predictions are right, by how sure they are: "
        f"{BINS} bins of equal width. On the dashed line the network is as good as it says. The "
        "expected calibration error is the mean distance from it, over all images "
        f"(arXiv:1706.04599).</p><div class=grid><figure>{page.drawing(figure, alt)}</figure>"
        f"<div>{table}</div></div>"
    )


def _mistakes(scores: Scores, mistakes: Sequence[Example]) -> str:
    if not mistakes:
        return "<h2>Mistakes</h2><p>None.</p>"
    cards = [
        f"<figure>{page.image(e.image, e.name, photo=True)}<figcaption>"
        f'<strong class="bad">{page.escape(e.prediction)}</strong> {e.probability:.1%}, '
        f'truly <strong class="good">{page.escape(e.truth)}</strong><br>{page.escape(e.name)}'
        "</figcaption></figure>"
        for e in mistakes
    ]
    total = int(((scores.truth != scores.prediction) & (scores.truth >= 0)).sum())
    which = (
        f"the {len(cards)} most confident of {total:,}" if total > len(cards) else f"all {total:,}"
    )
    return (
        f'<h2>Mistakes: {which}</h2><div class="grid images" style="--column: 8.5rem">'
        f"{''.join(cards)}</div>"
    )


def _settings(report: Report) -> str:
    def table(values: Mapping[str, Any]) -> str:
        rows = (
            f'<tr><th scope="row">{page.escape(k.removeprefix("config."))}</th>'
            f'<td class="text">{page.escape(v)}</td></tr>'
            for k, v in values.items()
        )
        return f'<table class="settings"><tbody>{"".join(rows)}</tbody></table>'

    return (
        "<h2>Configuration</h2><p class=dim>What is not as by default.</p>"
        f"{table(report.changed)}<details><summary>All fields</summary>{table(report.config)}"
        "</details><h2>Environment</h2><p class=dim>Of the evaluation that this page shows.</p>"
        f"{table(report.environment)}"
    )
