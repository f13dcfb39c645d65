"""One page that shows why a network said what it said: a figure, or HTML to look around in."""

import base64
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax import page
from vit_jax.checkpoints.labels import ranked
from vit_jax.errors import UserError
from vit_jax.explain import features, figures
from vit_jax.explain.attention import head_maps, rollout_map
from vit_jax.explain.figures import ImageView, TitledMaps, draw_image, overlay
from vit_jax.explain.network import Tower, observe, on_grid, open_tower
from vit_jax.explain.relevance import class_targets, first_name, gives_classes, relevance_map
from vit_jax.pretrained import Pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BYTES = 6 << 20  # attention weights on a page; as text they are a third more
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


class Explanation(NamedTuple):
    """Why the network said what it said of an image, in no more bytes than a page needs.

    Attributes:
      name: the file's.
      view: the image, no larger than it is drawn.
      attention: see `attention_data`.
      classes: (label, probability), the most probable first; empty if the network gives none. With
        the loss "sigmoid" each probability is that of the class for itself.
      rollout: see `explain.rollout`, (rows, columns).
      relevance: see `explain.relevance`, of the two most probable classes or those asked for.
      heads: what the token that the head reads attends to in each head of the last block, then
        where those of attention pooling look, then `ImageModel.further_maps`.
    """

    name: str
    view: ImageView
    attention: dict[str, Any]
    classes: list[tuple[str, float]]
    rollout: np.ndarray
    relevance: TitledMaps
    heads: TitledMaps

    @property
    def maps(self) -> TitledMaps:
        """Rollout and relevance."""
        relevance = ((f"relevance: {name}", values) for name, values in self.relevance)
        return [("attention rollout", self.rollout), *relevance]


def explanations(
    vit: Pretrained,
    images: Sequence[str | os.PathLike],
    classes: Sequence[int | str] | None = None,
    *,
    top: int = 5,
) -> Iterator[Explanation]:
    """Explains image files one after the other.

    Args:
      vit: see `vit_jax.load`.
      images: paths.
      classes: whose relevance is wanted, see `explain.relevance`; by default the two most probable
        ones. LiT weights know no classes but these texts.
      top: how many classes to name.

    Raises UserError if the network has no attention or not these classes, or an image can't be
    read.
    """
    tower = open_tower(vit)
    blocks = tower.model.attended_blocks
    for name, view in zip(images, figures.views(vit, images), strict=True):
        seen = observe(tower, view.pixels)
        answers: list[tuple[Any, float]] = []  # Of classes by index, of LiT weights of texts.
        if vit.classifies_by_text and classes:
            embeddings = np.stack([embedding for _, embedding in class_targets(vit, classes)])
            cosine = embeddings @ (seen.answer / np.linalg.norm(seen.answer))
            answers = ranked(np.exp(np.asarray(vit.params["t"])) * cosine, list(map(str, classes)))
        elif not vit.classifies_by_text and gives_classes(vit):
            answers = ranked(seen.answer, range(len(seen.answer)), loss=vit.loss)
        shown = classes or [c for c, _ in answers[:2]]
        targets = class_targets(vit, shown) if shown else []
        block = f"block {blocks.stop}"
        heads = [(f"{block}, head {i + 1}", m) for i, m in enumerate(head_maps(tower, seen))]
        if seen.pooling is not None:
            pooled = on_grid(tower, seen.pooling)
            heads += [(f"pooling, head {i + 1}", m) for i, m in enumerate(pooled)]
        heads += seen.further.items()
        yield Explanation(
            os.fspath(name),
            view.thumbnail(),
            attention_data(seen.attention, MAX_BYTES // len(images), blocks.start),
            [(vit.label(c) if isinstance(c, int) else c, p) for c, p in answers[:top]],
            rollout_map(tower, seen),
            [(called, relevance_map(vit, tower, view.pixels, y)) for called, y in targets],
            heads,
        )


def attention_data(attention: np.ndarray, budget: int, first: int = 0) -> dict[str, Any]:
    """Attention (blocks, heads, t, t) as explain.js knows it, as many layers as fit so many bytes.
    `first` is the number of the first block.

    Returns:
      "layers": see `choose_layers`; "weights": uint8 (layers, t, t) as text in base 64, in 1/255 of
      each row's maximum; "top": (layers * t,), this maximum.
    """
    blocks, heads, t, _ = attention.shape
    layers = choose_layers(blocks, heads, budget // t**2)
    weights = np.stack([attention[b].mean(0) if h is None else attention[b, h] for b, h in layers])
    top = weights.max(axis=-1, keepdims=True)
    levels = np.rint(255 * weights / top.clip(1e-12)).astype(np.uint8)
    return {
        "layers": [(first + block, head) for block, head in layers],
        "weights": base64.b64encode(levels.tobytes()).decode(),
        "top": [float(f"{x:.4g}") for x in top.ravel()],
    }


def choose_layers(blocks: int, heads: int, room: int) -> list[tuple[int, int | None]]:
    """The (block, head) whose weights are on the page, by block; head None is the mean over heads.

    Args:
      blocks, heads: how many there are.
      room: how many may be chosen; there is one at least.
    """
    count = min(blocks, max(room, 1))
    means = np.unique(np.linspace(blocks - 1, 0, count).round().astype(int)).tolist()
    whole = (room - count) // heads if heads > 1 else 0  # Blocks with all their heads.
    return [
        (block, head)
        for block in means
        for head in (None, *range(heads if block >= blocks - whole else 0))
    ]


@page.styled
def page_figure(vit: Pretrained, explained: Sequence[Explanation]) -> "Figure":
    """The explanations as one figure: a few rows for each image, then the position embeddings.

    Raises UserError if it is higher than a PNG may be.
    """
    firsts = [math.ceil((3 + len(e.relevance)) / COLUMNS) for e in explained]
    rows = [  # Their heights in inches. Names of classes need some even beside a panorama.
        [2.6 * max(e.view.aspect, 0.6) + 0.35] * first
        + [2.6 * e.view.aspect + 0.35] * math.ceil(len(e.heads) / COLUMNS)
        for first, e in zip(firsts, explained, strict=True)
    ]
    similarity = _similarity(vit)
    last = 0 if similarity is None else features.positions_height(similarity, 6)
    heights = [*map(sum, rows), max(last, 3)]
    figure = page.new_figure(13, sum(heights))
    if (pixels := figure.bbox.height) > MAX_PIXELS:
        raise UserError(
            f"{len(explained)} images make a page of {pixels:,.0f} pixels, and a PNG may be "
            f"{MAX_PIXELS:,} high: give fewer, or write a name in .html"
        )
    figure.suptitle(_title(vit), fontsize=13)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, first, inches, e in zip(parts, firsts, rows, explained, strict=False):
        axes = figures.empty_axes(part, inches, COLUMNS)
        draw_image(axes[0, 0], e.view, Path(e.name).name)
        _draw_classes(axes[0, 1], e.classes)
        for places, maps in ((axes.ravel()[2:], e.maps), (axes[first:].ravel(), e.heads)):
            for ax, (title, values) in zip(places, maps, strict=False):
                draw_image(ax, e.view, title, values)
    left, right = parts[-1].subplots(1, 2)
    if similarity is None:
        left.axis("off")
    else:
        features.draw_positions(left, similarity)
    right.axis("off")
    shown = _notes(similarity is not None).items()
    notes = [_about(open_tower(vit)), *(f"{title}: {note}" for title, note in shown)]
    right.text(0, 1, "\n\n".join(notes), va="top", wrap=True, fontsize=9)
    return figure


def _draw_classes(ax: "Axes", classes: Sequence[tuple[str, float]]) -> None:
    """The most probable classes as bars with their names above."""
    for row, (label, probability) in enumerate(classes):
        ax.barh(row + 0.25, probability, height=0.3, color=page.BLUE)
        text = f"{probability:.1%}  {page.elide(first_name(label), figures.TITLE_CHARS)}"
        ax.text(0, row, text, va="bottom", fontsize=8)
    ax.set(xlim=(0, 1), ylim=(max(len(classes), 1), -0.6))


def page_html(vit: Pretrained, explained: Sequence[Explanation]) -> bytes:
    """The explanations as one file of HTML, which needs no network.

    On each image one may point at a patch and see what it attends to, in every block and head
    whose weights fit the page: of all its images `MAX_BYTES`, first the mean over heads of each
    block, then the heads of the last blocks. They are rounded to 1/255 of a row's maximum.
    """
    tower = open_tower(vit)
    sections = []
    for e in explained:
        place = {"grid": tower.grid, "first": tower.first_patch, "box": e.view.box}
        place["class_token"] = tower.model.has_class_token
        sections.append(
            {
                "name": Path(e.name).name,
                "image": overlay(e.view),
                "classes": [(first_name(label), probability) for label, probability in e.classes],
                "maps": [(title, overlay(e.view, m)) for title, m in e.maps],
                "heads": [(title, overlay(e.view, m)) for title, m in e.heads],
                "attention": place | e.attention,
            }
        )
    return page.render(
        "explain",
        _title(vit),
        about=_about(tower),
        notes=_notes(has_positions := _similarity(vit) is not None),
        sections=sections,
        positions=features.plot_position_similarity(vit) if has_positions else None,
    )


def _similarity(vit: Pretrained) -> np.ndarray | None:
    """See `features.position_similarity`; None of a network without position embeddings."""
    try:
        return features.position_similarity(vit)
    except UserError:
        return None


def _notes(has_positions: bool) -> dict[str, str]:
    return {k: v for k, v in NOTES.items() if has_positions or k != "Position embeddings"}


def _about(tower: Tower) -> str:
    """What is true of all maps."""
    (height, width), (rows, columns) = tower.spec.image_size, tower.spec.grid_size
    text = (
        f"An image goes in as {height}x{width} pixels, {rows}x{columns} patches. In each map the "
        "brightest patch counts most and the darkest least, so that maps can't be compared."
    )
    if tower.grid != tower.spec.grid_size:
        text += (
            " Blocks, rollout and relevance are those of the last stage, of {}x{} tokens: what the "
            "stages before it mix isn't followed. Of them is shown how much attention each token "
            "receives within its window."
        ).format(*tower.grid)
    return text


def _title(vit: Pretrained) -> str:
    return f"What {vit.spec.description} looks at"
