"""Attention as a page of HTML holds it, for its reader to look around in."""

import base64
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 6 << 20  # attention weights on a page; as text they are a third more


class Levels(NamedTuple):
    """Attention weights of some heads and means over heads.

    Attributes:
      layers: the (block, head) of each; head None is the mean over heads.
      levels: uint8 (layers, t, t), the weights of each row in 1/255 of its maximum.
      top: float32 (layers, t), this maximum.
    """

    layers: list[tuple[int, int | None]]
    levels: np.ndarray
    top: np.ndarray

    def as_data(self) -> dict[str, Any]:
        """What viewer.js has to know of it."""
        return {
            "layers": self.layers,
            "weights": base64.b64encode(self.levels.tobytes()).decode(),
            "top": [float(f"{x:.4g}") for x in self.top.ravel()],
        }


def levels(attention: np.ndarray, budget: int) -> Levels:
    """Attention (blocks, heads, t, t) rounded, as many layers as fit so many bytes."""
    blocks, heads, t, _ = attention.shape
    chosen = layers(blocks, heads, budget // t**2)
    weights = np.stack([attention[b].mean(0) if h is None else attention[b, h] for b, h in chosen])
    top = weights.max(axis=-1, keepdims=True)
    return Levels(chosen, np.rint(255 * weights / top.clip(1e-12)).astype(np.uint8), top[..., 0])


def layers(blocks: int, heads: int, room: int) -> list[tuple[int, int | None]]:
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
