"""Position embeddings: fixed ones, and learned ones resampled for another grid of patches."""

from collections.abc import Callable

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


# (rows, columns, d) float32 and a new (rows, columns) -> the same of the new grid.
POSITION_RESIZE: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "official": _official,
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
