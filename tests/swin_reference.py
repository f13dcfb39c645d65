"""Swin Transformers in float64 NumPy, of the papers' equations: one large matrix of scores for each
map, with no windows cut, and every index by a loop."""

import itertools
import math
import re

import numpy as np

from tests.reference import Arrays

EPSILON = 1e-5


def forward(
    arrays: Arrays, images: np.ndarray, *, window: int, pretrained: tuple[int, ...]
) -> np.ndarray:
    """Logits of images (n, h, w, c)."""
    a = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    kernel = a["embedding/kernel"]
    (ph, pw), (n, height, width, _) = kernel.shape[:2], images.shape
    x = np.empty((n, height // ph, width // pw, kernel.shape[-1]))
    for i, j in np.ndindex(x.shape[1:3]):
        patch = images[:, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw].astype(np.float64)
        x[:, i, j] = np.tensordot(patch, kernel, 3) + a["embedding/bias"]
    x = _norm(x, a, "embedding_norm")
    stages = 1 + max(int(m[1]) for key in a if (m := re.match(r"stage_(\d+)/", key)))
    for stage in range(stages):
        blocks = {m[1] for key in a if (m := re.match(rf"stage_{stage}/encoderblock_(\d+)/", key))}
        for block in range(len(blocks)):
            name = f"stage_{stage}/encoderblock_{block}"
            x = _block(x, a, name, window, block % 2 == 1, pretrained[stage])
        if stage < stages - 1:
            x = _merge(x, a, f"stage_{stage}/PatchMerging_0")
    x = _norm(x, a, "encoder_norm").mean(axis=(1, 2))
    return x @ a["head/kernel"] + a["head/bias"] if "head/kernel" in a else x


def _block(x, a, name, window, shifted, pretrained):
    mlp = f"{name}/MlpBlock_0"
    is_second = f"{name}/WindowAttention_0/logit_scale" in a

    def hidden(y):
        y = y @ a[f"{mlp}/Dense_0/kernel"] + a[f"{mlp}/Dense_0/bias"]
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        return y @ a[f"{mlp}/Dense_1/kernel"] + a[f"{mlp}/Dense_1/bias"]

    def attend(y):
        return _attention(y, a, f"{name}/WindowAttention_0", window, shifted, pretrained)

    for i, branch in enumerate((attend, hidden)):
        norm = f"{name}/LayerNorm_{i}"
        x = x + (_norm(branch(x), a, norm) if is_second else branch(_norm(x, a, norm)))
    return x


def axis(size: int, window: int, shifted: bool) -> list[tuple[int | None, int, int]]:
    """Of each place of a rolled and padded row: which place it was, its window and its region."""
    if size <= window:
        return [(i, 0, 0) for i in range(size)]
    shift = window // 2 if shifted else 0
    padded = -(-size // window) * window
    places = []
    for i in range(padded):
        region = (i >= padded - window) + (i >= padded - shift) if shift else 0
        places.append(((i + shift) % size if i < size else None, i // window, region))
    return places


def places_and_scores(grid, window, shifted):
    """((row, column) or None of each place, (places, places) to be added to its scores)."""
    rows, columns = (axis(size, window, shifted) for size in grid)
    places, groups = [], []
    for r, c in itertools.product(rows, columns):
        places.append(None if r[0] is None or c[0] is None else (r[0], c[0]))
        groups.append(((r[1], c[1]), (r[2], c[2])))
    added = np.full((len(places), len(places)), -np.inf)
    for p, q in itertools.product(range(len(places)), repeat=2):
        if groups[p][0] == groups[q][0]:
            added[p, q] = 0 if groups[p][1] == groups[q][1] else -100
    return places, added


def _attention(x, a, name, window, shifted, pretrained):
    n, rows, columns, d = x.shape
    places, added = places_and_scores((rows, columns), window, shifted)
    tokens = np.stack([np.zeros((n, d)) if p is None else x[:, p[0], p[1]] for p in places], 1)
    heads = a[f"{name}/query/kernel"].shape[1]
    query, key, value = (
        np.einsum("ntd,dhc->nhtc", tokens, a[f"{name}/{part}/kernel"])
        + (a[f"{name}/{part}/bias"][:, None] if f"{name}/{part}/bias" in a else 0)
        for part in ("query", "key", "value")
    )
    if f"{name}/logit_scale" in a:
        query, key = (y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
                      for y in (query, key))  # fmt: skip
        factor = np.exp(np.minimum(a[f"{name}/logit_scale"], math.log(100)))
    else:
        factor = query.shape[-1] ** -0.5
    scores = query @ key.swapaxes(2, 3) * factor
    for h, p, q in itertools.product(range(heads), *[range(len(places))] * 2):
        if added[p, q] > -np.inf:
            side = len(axis(columns, window, shifted))
            difference = np.subtract(divmod(p, side), divmod(q, side))
            scores[:, h, p, q] += _bias(a, name, h, difference, (rows, columns), window, pretrained)
    scores = scores + added
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = weights / weights.sum(axis=-1, keepdims=True) @ value
    y = np.einsum("nhtc,hcd->ntd", y, a[f"{name}/out/kernel"]) + a[f"{name}/out/bias"]
    out = np.zeros_like(x)
    for t, place in enumerate(places):
        if place is not None:
            out[:, place[0], place[1]] = y[:, t]
    return out


def _bias(a, name, head, difference, grid, window, pretrained):
    sides = [min(size, window) for size in grid]
    if f"{name}/relative_position_bias" in a:
        (dr, dc), (height, width) = difference, sides
        row = (dr + height - 1) * (2 * width - 1) + dc + width - 1
        return a[f"{name}/relative_position_bias"][row, head]
    coordinates = []
    for step, side in zip(difference, sides, strict=True):
        scaled = 8 * step / max((pretrained or side) - 1, 1)
        coordinates.append(math.copysign(math.log2(abs(scaled) + 1) / 3, scaled))
    first, second = (f"{name}/position_mlp/Dense_{i}" for i in (0, 1))
    hidden = np.maximum(coordinates @ a[f"{first}/kernel"] + a[f"{first}/bias"], 0)
    return 16 / (1 + math.exp(-(hidden @ a[f"{second}/kernel"][:, head])))


def _merge(x, a, name):
    n, rows, columns, d = x.shape
    padded = np.zeros((n, rows + rows % 2, columns + columns % 2, d))
    padded[:, :rows, :columns] = x
    parts = [padded[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
    joined, kernel = np.concatenate(parts, axis=-1), a[f"{name}/Dense_0/kernel"]
    if a[f"{name}/LayerNorm_0/scale"].shape == (4 * d,):
        return _norm(joined, a, f"{name}/LayerNorm_0") @ kernel
    return _norm(joined @ kernel, a, f"{name}/LayerNorm_0")


def _norm(x, a, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    return normal * a[f"{name}/scale"] + a[f"{name}/bias"]
