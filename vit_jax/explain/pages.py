"""One page that shows why a network said what it said: a figure, or HTML to look around in."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_jax import page
from vit_jax.errors import UserError
from vit_jax.explain.features import position_similarity
from vit_jax.explain.network import Tower, open_tower
from vit_jax.explain.plots import (
    TITLE_CHARS,
    aspect,
    draw_image,
    draw_positions,
    new_figure,
    overlay,
    plot_position_similarity,
    positions_height,
    shares,
)
from vit_jax.explain.relevance import first_name
from vit_jax.explain.summary import Explanation
from vit_jax.pretrained import Pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 5  # of a figure: image, classes, rollout and two of relevance; then the heads
MAX_PIXELS = (1 << 16) - 1  # that matplotlib draws

NOTES = {
    "Attention rollout": "how much of each patch reaches the head, if half of a token stays where "
    "it is in every block and half is passed on by attention, averaged over heads "
    "(arXiv:2005.00928).",
    "Relevance": "which patches speak for a class: attention weighed by the gradient of its logit "
    "(arXiv:2103.15679).",
    "Heads": "what the token that the head reads attends to; without a class token that is all "
    "tokens, averaged.",
    "Position embeddings": "at each patch's place a map of how alike its embedding is to all "
    "others.",
}


def page_figure(vit: Pretrained, explained: Sequence[Explanation]) -> "Figure":
    """The explanations as one figure: a few rows for each image, then the position embeddings.

    Raises UserError if it is higher than a PNG may be.
    """
    firsts = [math.ceil((3 + len(e.relevance)) / COLUMNS) for e in explained]
    rows = [  # Their heights in inches. Names of classes need some even beside a panorama.
        [2.6 * max(aspect(e.view), 0.6) + 0.35] * first
        + [2.6 * aspect(e.view) + 0.35] * math.ceil(len(e.heads) / COLUMNS)
        for first, e in zip(firsts, explained, strict=True)
    ]
    similarity = position_similarity(vit)
    heights = [*map(sum, rows), max(positions_height(similarity, 6), 3)]
    figure = new_figure(13, sum(heights))
    if (pixels := figure.bbox.height) > MAX_PIXELS:
        raise UserError(
            f"{len(explained)} images make a page of {pixels:,.0f} pixels, and a PNG may be "
            f"{MAX_PIXELS:,} high: give fewer, or write a name in .html"
        )
    figure.suptitle(_title(vit), fontsize=13, parse_math=False)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, first, inches, e in zip(parts, firsts, rows, explained, strict=False):
        axes = part.subplots(len(inches), COLUMNS, squeeze=False, height_ratios=inches)
        for ax in axes.ravel():
            ax.axis("off")
        draw_image(axes[0, 0], e.view, Path(e.name).name)
        _draw_classes(axes[0, 1], e.classes)
        draw_image(axes[0, 2], e.view, "attention rollout", e.rollout)
        for ax, (name, values) in zip(axes.ravel()[3:], e.relevance, strict=False):
            draw_image(ax, e.view, f"relevance: {name}", values)
        for ax, (name, values) in zip(axes[first:].ravel(), e.heads, strict=False):
            draw_image(ax, e.view, name, values)
    left, right = parts[-1].subplots(1, 2)
    draw_positions(left, similarity)
    right.axis("off")
    notes = [_about(open_tower(vit)), *(f"{title}: {note}" for title, note in NOTES.items())]
    right.text(0, 1, "\n\n".join(notes), va="top", wrap=True, fontsize=9)
    return figure


def _draw_classes(ax: "Axes", classes: Sequence[tuple[str, float]]) -> None:
    """The most probable classes as bars with their names above."""
    for row, (label, probability) in enumerate(classes):
        ax.barh(row + 0.25, probability, height=0.3, color="#0072B2")
        text = f"{probability:.1%}  {page.elide(first_name(label), TITLE_CHARS)}"
        ax.text(0, row, text, va="bottom", fontsize=8, parse_math=False)
    ax.set(xlim=(0, 1), ylim=(max(len(classes), 1), -0.6))


def page_html(vit: Pretrained, explained: Sequence[Explanation]) -> bytes:
    """The explanations as one file of HTML, which needs no network.

    On each image one may point at a patch and see what it attends to, in every block and head
    whose weights fit the page: of all its images `viewer.MAX_BYTES`, first the mean over heads
    of each block, then the heads of the last blocks. They are rounded to 1/255 of a row's maximum.
    """
    tower = open_tower(vit)
    body = [
        f'<p class="dim">{_about(tower)}</p>',
        _notes("Attention rollout", "Relevance", "Heads"),
    ]
    body += [_section(tower, i, e) for i, e in enumerate(explained)]
    drawing = page.drawing(plot_position_similarity(vit), "likeness of the position embeddings")
    body += ["<h2>Position embeddings</h2>", _notes("Position embeddings")]
    body += [f'<div class="positions">{drawing}</div>']
    script = Path(__file__).with_name("viewer.js").read_text(encoding="utf-8")
    return page.document(_title(vit), "\n".join(body), style=_STYLE, script=script)


_STYLE = """
.maps img { width: 100%; max-height: 20rem; object-fit: contain;
  object-position: left } .maps table { font-size: .875rem }
.positions svg { width: 36rem }
.viewer { display: flex; flex-wrap: wrap; gap: 1rem; align-items: start }
.viewer div { flex: 1 1 15rem; max-width: 26rem }
.viewer label { display: block; margin-bottom: .6rem }
.viewer input { display: block; width: 100%; padding: 0 }
.viewer canvas { touch-action: pan-y; cursor: crosshair }
"""

_VIEWER = """
<h3>What each patch attends to</h3>
<div class="viewer" data-image="{i}">
<canvas tabindex="0" role="application" aria-label="Attention on {name}"
aria-describedby="said{i}"></canvas>
<div>
<p class="dim">Point at a patch, touch it or move with the arrow keys: what it attends to lights
up.</p>
<label><span></span><input type="range" class="block" aria-label="Block"></label>
<label><span></span><input type="range" class="head" aria-label="Head"></label>
<button type="button">Class token</button>
<p id="said{i}" role="status"></p>
</div>
</div>
"""


def _section(tower: Tower, i: int, e: Explanation) -> str:
    """The HTML of one image."""
    name = Path(e.name).name

    def figure(title: str, values: np.ndarray) -> str:
        element = page.image(overlay(e.view, values), f"{title} of {name}", photo=True)
        return f"<figure>{element}<figcaption>{page.escape(title)}</figcaption></figure>"

    image = page.image(overlay(e.view), name, photo=True)
    maps = [figure("attention rollout", e.rollout)]
    maps += [figure(f"relevance: {label}", values) for label, values in e.relevance]
    heads = [figure(title, values) for title, values in e.heads]
    place = {"grid": tower.spec.grid_size, "first": tower.first_patch, "box": shares(e.view)}
    answers = [(first_name(label), probability) for label, probability in e.classes]
    classes = page.table(["class", "probability"], answers, name=f"classes of {name}")
    return "\n".join(
        [
            f'<section><h2>{page.escape(name)}</h2><div class="grid maps" style="--column: 13rem">',
            f'<figure id="image{i}">{image}</figure>',
            classes if e.classes else "",
            *maps,
            '</div><h3>Heads</h3><div class="grid maps" style="--column: 9rem">',
            *heads,
            "</div>",
            _VIEWER.format(i=i, name=page.escape(name)),
            page.data(f"attention{i}", place | e.attention.as_data()),
            "</section>",
        ]
    )


def _notes(*titles: str) -> str:
    return "\n".join(f'<p class="dim"><b>{title}:</b> {NOTES[title]}</p>' for title in titles)


def _about(tower: Tower) -> str:
    """What is true of all maps."""
    (height, width), (rows, columns) = tower.spec.image_size, tower.spec.grid_size
    return (
        f"An image goes in as {height}x{width} pixels, {rows}x{columns} patches. In each map the "
        "brightest patch counts most and the darkest least, so that maps can't be compared."
    )


def _title(vit: Pretrained) -> str:
    return f"What {vit.spec.description} looks at"
