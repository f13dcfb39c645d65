"""Attention as numbers. Shapes: n images, t tokens (the class token first, if there is one)."""

from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import UserError
from vit_jax.explain.figures import Images, plot_maps, views
from vit_jax.explain.network import Seen, Tower, observe, on_grid, open_tower, reading
from vit_jax.page import BLUE, ORANGE, new_figure, styled
from vit_jax.pretrained import Pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_maps(vit: Pretrained, images: Images) -> np.ndarray:
    """Whom each token attends to, in each head of each block.

    Args:
      vit: see `vit_jax.load`.
      images: see `explain.figures.views`.

    Returns:
      float32 (n, blocks, heads, t, t): a row for each query token; rows sum to 1.

    Raises UserError if the network has no attention, or an image can't be used.
    """
    tower = open_tower(vit)
    return np.stack([observe(tower, view.pixels).attention for view in views(vit, images)])


def plot_attention_maps(vit: Pretrained, images: Images, block: int = -1) -> "Figure":
    """What the token that the head reads attends to, an overlay for each head of a block.

    Without class token that is all tokens, averaged as the head reads them.

    Raises UserError as `attention_maps`, and if there is no such block.
    """
    tower = open_tower(vit)
    blocks = tower.model.attended_blocks
    number = block if block >= 0 else blocks.stop + block
    if number not in blocks:
        raise UserError(f"block is {block}, expected {blocks[0]} to {blocks[-1]}")
    index = number - blocks.start
    maps = [head_maps(tower, observe(tower, view.pixels), index) for view in views(vit, images)]
    name = f"block {number + 1}, head"
    return plot_maps(
        vit, images, [[(f"{name} {i + 1}", m) for i, m in enumerate(ms)] for ms in maps]
    )


def head_maps(tower: Tower, seen: Seen, block: int = -1) -> np.ndarray:
    """float32 (heads, rows, columns): what the token that the head reads attends to in a block.

    Without class token that is all tokens, averaged as `reading` weighs them.
    """
    return on_grid(tower, reading(tower, seen) @ seen.attention[block])


def map_attention(vit: Pretrained, images: Images) -> np.ndarray:
    """Where each head of the attention pooling looks (arXiv:2106.04560).

    Returns:
      float32 (n, heads, rows, columns); each map sums to 1.

    Raises UserError as `attention_maps`, and if the network pools otherwise.
    """
    tower = open_tower(vit)
    if tower.spec.classifier != "map":
        raise UserError(
            f"{tower.spec.description} has no attention pooling (its classifier is "
            f"{tower.spec.classifier!r}): look at the rollout instead"
        )
    maps = [observe(tower, view.pixels).pooling for view in views(vit, images)]
    return on_grid(tower, np.stack(maps))


def plot_map_attention(vit: Pretrained, images: Images) -> "Figure":
    """`map_attention` over each image, an overlay for each head."""
    maps = map_attention(vit, images)
    return plot_maps(vit, images, [[(f"head {i + 1}", m) for i, m in enumerate(ms)] for ms in maps])


def rollout(vit: Pretrained, images: Images) -> np.ndarray:
    """How much of each patch reaches the head, if attention passes tokens on (arXiv:2005.00928).

    The heads of a block are averaged to A; half of a token stays where it is, so that a block is
    0.5 A + 0.5 I with rows made to sum to 1, and all blocks are the product of these. The row is
    that of what the head reads: the class token, the mean of the tokens, or their mean weighed by
    attention pooling.

    Returns:
      float32 (n, rows, columns). What is missing to a sum of 1 is the class token's.

    Raises UserError as `attention_maps`.
    """
    tower = open_tower(vit)
    maps = [rollout_map(tower, observe(tower, view.pixels)) for view in views(vit, images)]
    return np.stack(maps)


def plot_rollout(vit: Pretrained, images: Images) -> "Figure":
    """`rollout` over each image: a row of the image and the overlay for each."""
    return plot_maps(vit, images, [[("attention rollout", m)] for m in rollout(vit, images)])


def rollout_map(tower: Tower, seen: Seen) -> np.ndarray:
    """float32 (rows, columns): `rollout` of one image."""
    row = reading(tower, seen).astype(np.float64)
    for heads in seen.attention[::-1]:  # From the head down: a row is cheaper than a matrix.
        block = heads.mean(axis=0, dtype=np.float64) + np.eye(len(row))
        row = row @ (block / block.sum(axis=1, keepdims=True))
    return on_grid(tower, row).astype(np.float32)


def attention_distance(vit: Pretrained, images: Images) -> np.ndarray:
    """How far each head looks (Figure 7 of arXiv:2010.11929).

    The distance between the centres of two patches in pixels of the network's input, weighed by how
    much one attends to the other, averaged over the query patches. The class token is left out, and
    the weights of the patches are made to sum to 1.

    Returns:
      float32 (n, blocks, heads).

    Raises UserError as `attention_maps`.
    """
    tower = open_tower(vit)
    grid, first = tower.grid, tower.first_patch
    patches = np.divide(tower.spec.grid_size, grid).round()  # Of a token of a last stage.
    places = np.argwhere(np.ones(grid)) * patches * tower.model.stride
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    result = []
    for view in views(vit, images):
        weights = observe(tower, view.pixels).attention[..., first:, first:]
        far = (weights * distance).sum(axis=-1) / weights.sum(axis=-1).clip(1e-12)
        result.append(far.mean(axis=-1))
    return np.stack(result).astype(np.float32)


@styled
def plot_attention_distance(vit: Pretrained, images: Images) -> "Figure":
    """`attention_distance` averaged over images: a point for each head, by depth."""
    from matplotlib.ticker import MaxNLocator

    distance = attention_distance(vit, images).mean(axis=0)
    figure = new_figure(6.4, 4)
    ax = figure.subplots()
    depth = np.array(open_tower(vit).model.attended_blocks) + 1
    ax.plot(depth, distance, "o", color=BLUE, markersize=5, alpha=0.7)
    ax.plot(depth, distance.mean(axis=1), color=ORANGE, label="mean of the heads")
    ax.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    ax.grid()
    return figure
