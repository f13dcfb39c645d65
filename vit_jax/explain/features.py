"""Tokens, position embeddings and filters as numbers."""

import math
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import UserError
from vit_jax.explain.figures import Images, empty_axes, plot_maps, views
from vit_jax.explain.network import observe, on_grid, open_tower
from vit_jax.page import new_figure, styled
from vit_jax.pretrained import Pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def token_norms(vit: Pretrained, images: Images) -> np.ndarray:
    """The length of each patch's token after each block.

    A few very long ones on plain background are no longer about their patch (arXiv:2309.16588).

    Args:
      vit: see `vit_jax.load`.
      images: see `explain.figures.views`.

    Returns:
      float32 (n, blocks, rows, columns).

    Raises UserError if the network is no Vision Transformer, or an image can't be used.
    """
    tower = open_tower(vit)
    blocks = [observe(tower, view.pixels).blocks for view in views(vit, images)]
    return on_grid(tower, np.linalg.norm(np.stack(blocks), axis=-1))


def plot_token_norms(vit: Pretrained, images: Images) -> "Figure":
    """`token_norms` over each image, an overlay for each block."""
    numbers = open_tower(vit).model.attended_blocks
    titled = [
        [(f"block {i + 1}: up to {m.max():.3g}", m) for i, m in zip(numbers, blocks, strict=True)]
        for blocks in token_norms(vit, images)
    ]
    return plot_maps(vit, images, titled)


def feature_pca(vit: Pretrained, images: Images) -> np.ndarray:
    """The encoder's patch tokens as colours: alike are those whose features are.

    Red, green and blue are the first three principal components over the patches of all images,
    each stretched so that its middle 98 % fill [0, 1].

    Returns:
      float32 (n, rows, columns, 3) in [0, 1].

    Raises UserError as `token_norms`.
    """
    tower = open_tower(vit)
    tokens = np.stack([observe(tower, view.pixels).tokens for view in views(vit, images)])
    patches = tokens[:, tower.first_patch :].reshape(-1, tokens.shape[-1])
    centred = patches - patches.mean(axis=0)
    components = _components(centred, 3)
    scores = np.zeros((len(centred), 3))  # Of fewer than three patches there are fewer.
    scores[:, : len(components)] = centred @ components.T
    low, high = np.quantile(scores, (0.01, 0.99), axis=0)
    colours = ((scores - low) / (high - low).clip(1e-12)).clip(0, 1)
    return colours.reshape(len(tokens), *tower.grid, 3).astype(np.float32)


def plot_feature_pca(vit: Pretrained, images: Images) -> "Figure":
    """`feature_pca` beside each image."""
    return plot_maps(vit, images, [[("features", m)] for m in feature_pca(vit, images)])


def position_similarity(vit: Pretrained) -> np.ndarray:
    """How alike the position embeddings of patches are (Figure 7 of arXiv:2010.11929).

    Returns:
      float32 (rows, columns, rows, columns): the cosine of the angle between those of the patch
      that the first two indices name and that of the last two.

    Raises UserError if the network is no Vision Transformer.
    """
    tower = open_tower(vit)
    positions = tower.model.position_vectors(tower.params, tower.spec.grid_size)
    vectors = np.asarray(positions, np.float64)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return (vectors @ vectors.T).reshape(tower.spec.grid_size * 2).astype(np.float32)


@styled
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
        places = np.arange(count)
        axis.set_ticks(places * (count + gap) + (count - 1) / 2, [str(i + 1) for i in places])
    ax.tick_params(labelsize=7, length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="column of the patch", ylabel="row of the patch")
    ax.set_title("Likeness of position embeddings")
    bar = ax.figure.colorbar(shown, ax=ax, shrink=0.6, label="cosine similarity")
    bar.outline.set_visible(False)


def embedding_filters(vit: Pretrained, count: int = 28) -> np.ndarray:
    """The principal components of the filters that look at the pixels (Figure 7 of
    arXiv:2010.11929): of the patch embedding, of a hybrid of its ResNet's first convolution.

    Args:
      vit: see `vit_jax.load`.
      count: how many; fewer are returned if there are fewer.

    Returns:
      float32 (count, h, w, c) of length 1, the one with the largest variance first.

    Raises UserError if the network is no Vision Transformer, or count is less than 1.
    """
    if count < 1:
        raise UserError(f"count is {count}, expected at least 1")
    tower = open_tower(vit)
    filters = np.moveaxis(tower.model.embedding_filters(tower.params), -1, 0)
    flat = filters.reshape(len(filters), -1)
    components = _components(flat - flat.mean(axis=0), count)
    return components.reshape(-1, *filters.shape[1:]).astype(np.float32)


@styled
def plot_embedding_filters(vit: Pretrained, count: int = 28) -> "Figure":
    """`embedding_filters`; grey is zero, each is stretched to its largest value."""
    filters = embedding_filters(vit, count)
    columns = min(7, len(filters))
    rows = math.ceil(len(filters) / columns)
    figure = new_figure(0.9 * columns, 0.9 * rows + 0.4)
    figure.suptitle("Principal components of the embedding filters", fontsize=11)
    for ax, filter_ in zip(empty_axes(figure, [1] * rows, columns).ravel(), filters, strict=False):
        colours = filter_ if filter_.shape[2] == 3 else filter_.mean(axis=2)
        scaled = 0.5 + 0.5 * colours / np.abs(colours).max().clip(1e-12)
        ax.imshow(scaled, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


def _components(rows: np.ndarray, count: int) -> np.ndarray:
    """(count, d): principal components of centred rows (n, d), their largest entries positive."""
    _, _, components = np.linalg.svd(rows, full_matrices=False)
    components = components[:count]
    largest = np.take_along_axis(
        components, np.abs(components).argmax(axis=1, keepdims=True), axis=1
    )
    return components * np.where(largest < 0, -1, 1)
