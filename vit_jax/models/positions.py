"""Position embeddings: fixed ones, and learned ones resampled for another grid of patches."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError


def sincos_positions(grid_size: tuple[int, int], width: int) -> jax.Array:
    """Fixed position embeddings: sines and cosines of the column and of the row of a patch.

    With D = width and w_i = 10000^(-i / (D/4 - 1)), i < D/4, the four quarters are sin(x w), cos(x
    w), sin(y w) and cos(y w); x is the column and y the row (arXiv:2104.02057, section 4).

    Returns:
      (1, rows * columns, width) float32.

    Raises UserError if the width can't be cut in four.
    """
    if width % 4 or width < 8:
        raise UserError(
            f"hidden_size is {width}, expected a multiple of 4 from 8 for sincos2d positions"
        )
    rows, columns = grid_size
    # In NumPy's float64 and rounded once: the angles reach hundreds of radians.
    frequencies = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = (axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:rows, :columns])
    positions = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return jnp.asarray(positions[None], jnp.float32)


def _official(grid: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """Bilinear with the corners of the two grids aligned and no antialiasing (section 3.2 of
    arXiv:2010.11929 and its published code).

    Where the official code rounds the last corner to just outside of the stored grid and gives
    zeros for it (28 to 14 rows, for one), this gives the corner.
    """
    import scipy.ndimage  # Slow to import.

    factors = (new[0] / grid.shape[0], new[1] / grid.shape[1], 1)
    # "nearest" is for the corner that rounding puts a little outside of the grid.
    return scipy.ndimage.zoom(grid, factors, order=1, mode="nearest")


def resize_matrix(
    old: int,
    new: int,
    *,
    cubic: float | None,
    antialias: bool = False,
    offset: float = 0.0,
) -> np.ndarray:
    """The weights (new, old) float64 by which a row of values becomes one of another length.

    Place i of the new row is place (i + 1/2) s - 1/2 of the old one, s = old / (new + offset).

    Args:
      cubic: the a of Keys' kernel (1981); None for the linear one.
      antialias: widen the kernel when shrinking, and leave out what lies outside of the row;
        without, the first and last value go on there.
      offset: see above; not 0 in DINOv2's code (arXiv:2304.07193), whose scale so isn't rounded.
    """
    scale = old / (new + offset)
    width = max(scale, 1.0) if antialias else 1.0
    centers = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    reach = math.ceil((1 if cubic is None else 2) * width)
    taps = np.floor(centers) + np.arange(-reach, reach + 2)
    weights = _kernel(np.abs(taps - centers) / width, cubic)
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1).astype(int)), weights)
    return matrix


def _kernel(t: np.ndarray, a: float | None) -> np.ndarray:
    """Of distances t >= 0."""
    if a is None:
        return np.maximum(1 - t, 0)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((t - 5) * t + 8) * t * a - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def _by_matrices(grid: np.ndarray, new: tuple[int, int], **rule: Any) -> np.ndarray:
    rows, columns = (resize_matrix(o, n, **rule) for o, n in zip(grid.shape[:2], new, strict=True))
    return np.einsum("ab,cd,bde->ace", rows, columns, grid, optimize=True).astype(np.float32)


# (rows, columns, d) float32 and a new (rows, columns) -> the same of the new grid.
POSITION_RESIZE: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "official": _official,
    "torch": functools.partial(_by_matrices, cubic=-0.75),  # DeiT, MAE, Hugging Face.
    # timm, and DINOv2 with registers.
    "torch-antialias": functools.partial(_by_matrices, cubic=-0.5, antialias=True),
    "dinov2": functools.partial(_by_matrices, cubic=-0.75, offset=0.1),
    "bilinear": functools.partial(_by_matrices, cubic=None),  # FlexiViT.
}


def resample(
    embedding: np.ndarray,
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    prefix: int,
    rule: str = "official",
) -> np.ndarray:
    """Resamples learned position embeddings for another grid of patches.

    Args:
      embedding: (1, tokens, d) float32, row-major over the grid, prefix tokens first.
      old, new: (rows, columns) of the stored and the wanted grid.
      prefix: how many rows belong to no patch, but e.g. to a class token; they are copied.
      rule: one of POSITION_RESIZE.

    Returns:
      (1, tokens, d) for the new grid, float32; the input itself where the grids agree.

    Raises UserError for an unknown rule.
    """
    if rule not in POSITION_RESIZE:
        raise UserError(
            f"unknown position_resize {rule!r}, expected one of {', '.join(POSITION_RESIZE)}"
        )
    if old == new:
        return embedding
    grid = POSITION_RESIZE[rule](embedding[0, prefix:].reshape(*old, -1), new)
    assert grid.shape[:2] == new, (grid.shape, new)
    return np.concatenate([embedding[0, :prefix], grid.reshape(new[0] * new[1], -1)])[None]
