"""Images of explanations. Each `plot_` function takes what its twin takes, and returns a
matplotlib figure, made without pyplot: no window, no state left behind."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import UserError
from vit_jax.explain.attention import (
    attention_distance,
    head_maps,
    map_attention,
    rollout,
)
from vit_jax.explain.features import (
    embedding_filters,
    feature_pca,
    position_similarity,
    token_norms,
)
from vit_jax.explain.images import SIDE, Images, View, small, views
from vit_jax.explain.network import observe, open_tower
from vit_jax.explain.relevance import class_name, relevance
from vit_jax.page import elide
from vit_jax.pretrained import Pretrained

TITLE_CHARS = 36  # that fit above an image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_rollout(vit: Pretrained, images: Images) -> "Figure":
    """`rollout` over each image: a row of the image and the overlay for each."""
    maps = rollout(vit, images)
    return _rows(vit, images, [[("attention rollout", m)] for m in maps])


def plot_relevance(
    vit: Pretrained, images: Images, classes: Sequence[int | str] | None = None
) -> "Figure":
    """`relevance` over each image, an overlay a class, each with its own scale."""
    maps = relevance(vit, images, classes)
    names = [class_name(vit, c) for c in classes or ()]
    titles = [f"for {name}" for name in names or ["the most probable class"]]
    return _rows(vit, images, [list(zip(titles, m, strict=True)) for m in maps])


def plot_attention_maps(vit: Pretrained, images: Images, block: int = -1) -> "Figure":
    """What the token that the head reads attends to, an overlay for each head of a block.

    Without class token that is all tokens, averaged as the head reads them.

    Raises UserError as `attention_maps`, and if there is no such block.
    """
    tower = open_tower(vit)
    count = tower.spec.num_layers
    if not -count <= block < count:
        raise UserError(f"block is {block}, expected 0 to {count - 1}")
    titled = []
    for view in views(vit, images):
        maps = head_maps(tower, observe(tower, view.pixels), block)
        titled.append([(f"block {block % count + 1}, head {i + 1}", m) for i, m in enumerate(maps)])
    return _rows(vit, images, titled)


def plot_map_attention(vit: Pretrained, images: Images) -> "Figure":
    """`map_attention` over each image, an overlay for each head."""
    maps = map_attention(vit, images)
    return _rows(vit, images, [[(f"head {i + 1}", m) for i, m in enumerate(ms)] for ms in maps])


def plot_token_norms(vit: Pretrained, images: Images) -> "Figure":
    """`token_norms` over each image, an overlay for each block."""
    maps = token_norms(vit, images)
    titled = [
        [(f"block {i + 1}: up to {m.max():.3g}", m) for i, m in enumerate(blocks)]
        for blocks in maps
    ]
    return _rows(vit, images, titled)


def plot_feature_pca(vit: Pretrained, images: Images) -> "Figure":
    """`feature_pca` beside each image."""
    maps = feature_pca(vit, images)
    return _rows(vit, images, [[("features", m)] for m in maps])


def plot_position_similarity(vit: Pretrained) -> "Figure":
    """`position_similarity`: at each patch's place the map of its likeness to all others."""
    similarity = position_similarity(vit)
    figure = new_figure(4.4, positions_height(similarity, 4.4))
    draw_positions(figure.subplots(), similarity)
    return figure


def positions_height(similarity: np.ndarray, width: float) -> float:
    """How high `draw_positions` is where it is so wide, both in inches."""
    rows, columns = similarity.shape[:2]
    return 1 + min(0.72 * rows / columns, 1.5) * width


def draw_positions(ax: "Axes", similarity: np.ndarray) -> None:
    """Draws `position_similarity`."""
    rows, columns = similarity.shape[:2]
    gap = max(rows, columns) // 12 + 1
    # One image of maps with gaps between them is quicker than hundreds of axes.
    padded = np.pad(similarity, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    tiles = padded.swapaxes(1, 2).reshape(rows * (rows + gap), columns * (columns + gap))
    shown = ax.imshow(tiles[:-gap, :-gap], cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    for axis, count in ((ax.xaxis, columns), (ax.yaxis, rows)):
        axis.set_ticks(
            np.arange(count) * (count + gap) + (count - 1) / 2, [str(i + 1) for i in range(count)]
        )
    ax.tick_params(labelsize=7, length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="column of the patch", ylabel="row of the patch")
    ax.set_title("Likeness of position embeddings", fontsize=11, loc="left")
    bar = ax.figure.colorbar(shown, ax=ax, shrink=0.6, label="cosine similarity")
    bar.outline.set_visible(False)


def plot_embedding_filters(vit: Pretrained, count: int = 28) -> "Figure":
    """`embedding_filters`; grey is zero, each is stretched to its largest value."""
    filters = embedding_filters(vit, count)
    columns = min(7, len(filters))
    rows = math.ceil(len(filters) / columns)
    figure = new_figure(0.9 * columns, 0.9 * rows + 0.4)
    figure.suptitle("Principal components of the embedding filters", fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, filter_ in zip(axes, filters, strict=False):
        colours = filter_ if filter_.shape[2] == 3 else filter_.mean(axis=2)
        scaled = 0.5 + 0.5 * colours / np.abs(colours).max().clip(1e-12)
        ax.imshow(scaled, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


def plot_attention_distance(vit: Pretrained, images: Images) -> "Figure":
    """`attention_distance` averaged over images: a point for each head, by depth."""
    from matplotlib.ticker import MaxNLocator

    distance = attention_distance(vit, images).mean(axis=0)
    figure = new_figure(6.4, 4)
    ax = figure.subplots()
    depth = np.arange(1, len(distance) + 1)
    ax.plot(depth, distance, "o", color="#0072B2", markersize=5, alpha=0.7)
    ax.plot(depth, distance.mean(axis=1), color="#D55E00", linewidth=1.5, label="mean of the heads")
    ax.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    ax.grid(alpha=0.25)
    return figure


def overlay(view: View, values: np.ndarray | None = None) -> np.ndarray:
    """The image with a map over the part that the network saw; the rest is darker.

    Args:
      view: the image.
      values: (rows, columns) shown as heat from the minimum to the maximum; or (rows, columns, 3)
        in [0, 1], colours in place of the image; or None for the image alone.

    Returns:
      uint8 (h, w, 3) in the image's own aspect.
    """
    from matplotlib import colormaps

    from vit_jax.data.images import resize

    image = shown_image(view)
    if values is None:
        return image
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    result = 0.35 * grey
    (y, x, height, width), (h, w) = shares(view), image.shape[:2]
    part = np.s_[round(y * h) : round((y + height) * h), round(x * w) : round((x + width) * w)]
    size = grey[part].shape[:2]
    if values.ndim == 3:
        result[part] = 255 * resize(values.astype(np.float32), size)
    else:
        low, high = values.min(), values.max()
        heat = (values - low) / max(high - low, 1e-3 * high, 1e-12)  # A flat map stays cold.
        heat = resize(heat.astype(np.float32)[..., None], size).clip(0, 1)
        colours = 255 * colormaps["inferno"](heat[..., 0])[..., :3]
        weight = 0.35 + 0.4 * heat
        result[part] = (1 - weight) * grey[part] + weight * colours
    return np.rint(result).clip(0, 255).astype(np.uint8)


def shown_image(view: View) -> np.ndarray:
    """The image in a size to be looked at, uint8 (h, w, 3)."""
    image = small(view).image
    image = image if image.shape[2] == 3 else image[..., :1].repeat(3, axis=2)
    times = max(SIDE // 2 // max(image.shape[:2]), 1)  # A tiny one is magnified as it is.
    return image.repeat(times, axis=0).repeat(times, axis=1)


def shares(view: View) -> tuple[float, float, float, float]:
    """(top, left, height, width) of what the network saw, in shares of the image's sides."""
    (top, left, height, width), (h, w, _) = view.box, view.image.shape
    top, left = max(top, 0.0), max(left, 0.0)
    return top / h, left / w, min(height / h, 1.0), min(width / w, 1.0)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rows(
    vit: Pretrained,
    images: Images,
    maps: Sequence[Sequence[tuple[str, np.ndarray]]],
) -> "Figure":
    """A row for each image: itself, then its titled maps over it, wrapped after six."""
    shown = list(zip(views(vit, images), maps, strict=True))
    columns = min(1 + len(maps[0]), 6)
    lines = math.ceil((1 + len(maps[0])) / columns)
    figure = new_figure(2.3 * columns, sum(lines * 2.3 * aspect(view) + 0.3 for view, _ in shown))
    ratios = [aspect(view) for view, _ in shown]
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=ratios)
    for part, (view, titled) in zip(parts[:, 0], shown, strict=True):
        axes = part.subplots(lines, columns, squeeze=False).ravel()
        for ax in axes:
            ax.axis("off")
        draw_image(axes[0], view, "")
        for ax, (title, values) in zip(axes[1:], titled, strict=False):
            draw_image(ax, view, title, values)
    return figure


def aspect(view: View) -> float:
    """Height by width that an image is given room for."""
    return min(max(view.image.shape[0] / view.image.shape[1], 0.3), 1.6)


def draw_image(ax: "Axes", view: View, title: str, values: np.ndarray | None = None) -> None:
    """Draws `overlay`."""
    ax.imshow(overlay(view, values), interpolation="antialiased")
    ax.set_title(elide(title, TITLE_CHARS), fontsize=8, parse_math=False)
    ax.axis("off")
