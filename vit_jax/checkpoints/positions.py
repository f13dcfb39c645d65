"""Position embeddings for another grid of patches."""

import numpy as np


def resample(
    embedding: np.ndarray, old: tuple[int, int], new: tuple[int, int], *, class_token: bool
) -> np.ndarray:
    """Resamples learned position embeddings as the official fine-tuning does.

    Bilinear with the corners of the two grids aligned and no antialiasing; the class token's row is
    copied (section 3.2 of arXiv:2010.11929 and its published code).

    Args:
      embedding: (1, tokens, d), row-major over the grid, the class token (if any) first.
      old, new: (rows, columns) of the stored and the wanted grid.
      class_token: whether the first row belongs to the class token.

    Returns:
      (1, tokens, d) for the new grid, float32; the input itself where the grids agree.
    """
    if old == new:
        return embedding
    import scipy.ndimage  # Comes with jax; slow to import.

    prefix = int(class_token)
    grid = embedding[0, prefix:].astype(np.float32).reshape(*old, -1)
    factors = (new[0] / old[0], new[1] / old[1], 1)
    grid = scipy.ndimage.zoom(grid, factors, order=1)
    assert grid.shape[:2] == new, (grid.shape, new)
    return np.concatenate([embedding[0, :prefix], grid.reshape(new[0] * new[1], -1)])[None]
