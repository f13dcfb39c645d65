"""Position embeddings for another grid of patches."""

import numpy as np


def resample(
    embedding: np.ndarray, old: tuple[int, int], new: tuple[int, int], *, class_token: bool
) -> np.ndarray:
    """Resamples learned position embeddings as the official fine-tuning does.

    Bilinear with the corners of the two grids aligned and no antialiasing; the class token's row is
    copied (section 3.2 of arXiv:2010.11929 and its published code). Where the official code rounds
    the last corner to just outside of the stored grid and gives zeros for it (28 to 14 rows, for
    one), this gives the corner.

    Args:
      embedding: (1, tokens, d) float32, row-major over the grid, the class token (if any) first.
      old, new: (rows, columns) of the stored and the wanted grid.
      class_token: whether the first row belongs to the class token.

    Returns:
      (1, tokens, d) for the new grid, float32; the input itself where the grids agree.
    """
    if old == new:
        return embedding
    import scipy.ndimage  # Slow to import.

    prefix = int(class_token)
    grid = embedding[0, prefix:].reshape(*old, -1)
    factors = (new[0] / old[0], new[1] / old[1], 1)
    # "nearest" is for the corner that rounding puts a little outside of the grid.
    grid = scipy.ndimage.zoom(grid, factors, order=1, mode="nearest")
    assert grid.shape[:2] == new, (grid.shape, new)
    return np.concatenate([embedding[0, :prefix], grid.reshape(new[0] * new[1], -1)])[None]
