"""T2T-ViT once more, in float64 and NumPy, by the names of its published files.

Written from the paper (arXiv:2101.11986): windows by loops, attention by its quadratic form.
"""

import math
from typing import Any

import numpy as np
from scipy.special import erf, softmax

from vit_jax.checkpoints import torch_t2t
from vit_jax.checkpoints.torch import write_torch

KINDS = ("performer", "transformer")
# A small one: two blocks of three heads.
SMALL: dict[str, Any] = dict(num_classes=5, hidden_size=12, num_layers=2, num_heads=3, mlp_dim=18)


def official_shapes(
    kind: str,
    grid: tuple[int, int] = (2, 2),
    *,
    width: int = 12,
    depth: int = 2,
    mlp_dim: int = 18,
    classes: int = 5,
    channels: int = 3,
) -> dict[str, tuple[int, ...]]:
    """The arrays of a published file."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid[0] * grid[1], width),
    }

    def dense(name: str, wide: int, narrow: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (narrow, wide)
        if bias:
            shapes[f"{name}.bias"] = (narrow,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    for i, size in ((1, 49 * channels), (2, 576)):
        name = f"tokens_to_token.attention{i}"
        norm(f"{name}.norm1", size)
        norm(f"{name}.norm2", 64)
        is_performer = kind == "performer"
        if is_performer:
            shapes[f"{name}.w"] = (32, 64)
        dense(f"{name}.kqv" if is_performer else f"{name}.attn.qkv", size, 192, is_performer)
        dense(f"{name}.proj" if is_performer else f"{name}.attn.proj", 64, 64)
        for layer in ("0", "2") if is_performer else ("fc1", "fc2"):
            dense(f"{name}.mlp.{layer}", 64, 64)
    dense("tokens_to_token.project", 576, width)
    for i in range(depth):
        norm(f"blocks.{i}.norm1", width)
        dense(f"blocks.{i}.attn.qkv", width, 3 * width, False)
        dense(f"blocks.{i}.attn.proj", width, width)
        norm(f"blocks.{i}.norm2", width)
        dense(f"blocks.{i}.mlp.fc1", width, mlp_dim)
        dense(f"blocks.{i}.mlp.fc2", mlp_dim, width)
    norm("norm", width)
    dense("head", width, classes)
    return shapes


def official_arrays(kind: str, seed: int = 0, **sizes: Any) -> dict[str, np.ndarray]:
    """Seeded numbers of such sizes that every part of the network counts."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in official_shapes(kind, **sizes).items():
        scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        scale = 0.2 if name.endswith(".w") else scale
        near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        arrays[name] = (near + scale * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def named_officially(arrays: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """Arrays of ours by the names of a published file."""
    is_performer = "tokens_to_token/attention1/features" in arrays
    table = torch_t2t.PERFORMER if is_performer else torch_t2t.TRANSFORMER
    return {k: np.asarray(v) for k, v in write_torch(arrays, table, depth).items()}


def unfold(images: np.ndarray, window: int, stride: int, padding: int) -> np.ndarray:
    """(n, h, w, c) -> (n, rows, columns, c * window**2), one number after the other."""
    n, h, w, c = images.shape
    rows, columns = ((s + 2 * padding - window) // stride + 1 for s in (h, w))
    out = np.zeros((n, rows, columns, c * window * window), images.dtype)
    for row in range(rows):
        for column in range(columns):
            for channel in range(c):
                for i in range(window):
                    for j in range(window):
                        y, x = row * stride - padding + i, column * stride - padding + j
                        place = (channel * window + i) * window + j
                        if 0 <= y < h and 0 <= x < w:
                            out[:, row, column, place] = images[:, y, x, channel]
    return out


def performer_weights(query: np.ndarray, key: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(n, t, t): its attention as a matrix, which it never makes."""

    def features(x: np.ndarray) -> np.ndarray:
        return np.exp(x @ w.T - np.square(x).sum(-1, keepdims=True) / 2) / math.sqrt(len(w))

    weights = features(query) @ features(key).swapaxes(1, 2)
    return weights / (weights.sum(-1, keepdims=True) + 1e-8)


def forward(arrays: dict[str, np.ndarray], images: np.ndarray, heads: int) -> np.ndarray:
    """Logits of (n, h, w, c)."""
    w = {name: np.float64(array) for name, array in arrays.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * (1 + erf(x / math.sqrt(2))) / 2

    def token_attention(x: np.ndarray, name: str) -> np.ndarray:
        z = norm(x, f"{name}.norm1")
        if f"{name}.w" in w:
            key, query, value = np.split(dense(z, f"{name}.kqv"), 3, axis=-1)
            weights, layers = performer_weights(query, key, w[f"{name}.w"]), ("mlp.0", "mlp.2")
            y = value + dense(weights @ value, f"{name}.proj")
        else:
            query, key, value = np.split(dense(z, f"{name}.attn.qkv"), 3, axis=-1)
            weights = softmax(query @ key.swapaxes(1, 2) / math.sqrt(x.shape[-1]), axis=-1)
            layers = ("mlp.fc1", "mlp.fc2")
            y = value + dense(weights @ value, f"{name}.attn.proj")
        hidden = gelu(dense(norm(y, f"{name}.norm2"), f"{name}.{layers[0]}"))
        return y + dense(hidden, f"{name}.{layers[1]}")

    x = np.float64(images)
    for i, split in ((1, (7, 4, 2)), (2, (3, 2, 1))):
        x = unfold(x, *split)
        tokens = x.reshape(len(x), -1, x.shape[-1])
        x = token_attention(tokens, f"tokens_to_token.attention{i}").reshape(*x.shape[:3], 64)
    x = dense(unfold(x, 3, 2, 1), "tokens_to_token.project").reshape(
        len(x), -1, w["norm.bias"].size
    )
    x = np.concatenate([np.tile(w["cls_token"], (len(x), 1, 1)), x], axis=1) + w["pos_embed"]
    depth = sum(name.endswith("attn.qkv.weight") for name in w if name.startswith("blocks."))
    for i in range(depth):
        z = dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        query, key, value = z.reshape(*z.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        y = (softmax(scores, axis=-1) @ value).swapaxes(1, 2).reshape(x.shape)
        x = x + dense(y, f"blocks.{i}.attn.proj")
        hidden = gelu(dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + dense(hidden, f"blocks.{i}.mlp.fc2")
    pooled = norm(x, "norm")[:, 0]
    return dense(pooled, "head") if "head.weight" in w else pooled
