"""Independent references: seeded weights and images, and the networks in float64 NumPy.

The generator follows a rule, so that files of any official shape can be made anywhere and numbers
that the original code computed from them (tests/official) can be compared. Every array has a stream
of its own, PCG64 seeded with (seed, CRC-32 of its name): its values don't depend on the others.
"""

import functools
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

OFFICIAL = Path(__file__).parent / "official"

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]

NORM_EPSILON = 1e-6
STANDARDISATION_EPSILON = 1e-5

FAINT_IMAGES = np.float32(1e-4)
_FAINT = re.compile(
    r"(embedding/(kernel|bias)|cls|Transformer/posembed_input/pos_embedding"
    r"|(conv_root|block\d+/unit\d+/conv(\d|_proj))/kernel)$"
)


@functools.cache
def facts(name: str):
    """A file of tests/official: "manifests", "fwd" or "interp"."""
    return json.loads((OFFICIAL / f"{name}.json").read_text())


def official_shapes(name: str, head: str = "1000", size: int = 224) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official ViT, as the original code makes them.

    `head` is a number of classes or "none", with "+rep" if there is a pre_logits layer.
    """
    manifest = facts("manifests")[name]
    shapes = dict(manifest["outside"]) | manifest["heads"][head]
    for i in range(manifest["num_layers"]):
        for key, shape in manifest["block"].items():
            shapes[f"Transformer/encoderblock_{i}/{key}"] = shape
    shapes["Transformer/posembed_input/pos_embedding"] = manifest["positions"][str(size)]
    return {key: tuple(shape) for key, shape in shapes.items()}


def make_params(shapes: Shapes, seed: int, *, faint: bool = False) -> dict[str, np.ndarray]:
    """Random float32 arrays {name: array} of a size that keeps activations near 1.

    With `faint` what the first normalisation sees is a thousand times smaller, so that the epsilons
    matter; the images of a hybrid are then to be multiplied with FAINT_IMAGES.
    """
    params = {key: _array(key, shapes[key], seed) for key in sorted(shapes)}
    if not faint:
        return params
    return {k: v * np.float32(1e-3) if _FAINT.match(k) else v for k, v in params.items()}


def _array(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    sequence = np.random.SeedSequence([seed, zlib.crc32(key.encode())])
    normal = np.random.Generator(np.random.PCG64(sequence)).standard_normal(shape, np.float32)
    *_, owner, kind = ("", *key.split("/"))
    if kind == "kernel":
        # (width, heads, head width) into the heads; all axes but the last elsewhere.
        into_heads = owner in ("query", "key", "value")
        inputs = shape[0] if into_heads else math.prod(shape[:-1])
        return normal * np.float32(1 / math.sqrt(inputs))
    if kind == "scale":
        return np.float32(1) + np.float32(0.1) * normal
    if kind == "t":
        return np.float32(2) + np.float32(0.1) * normal
    is_norm = owner.startswith(("LayerNorm_", "gn")) or owner.endswith("norm")
    deviations = {"pos_embedding": 0.2, "cls": 0.5, "probe": 0.5, "embedding": 0.3}
    deviations["registers"] = deviations["dist"] = 0.5
    deviations["features"] = 0.2
    deviations["relative_position_bias"] = deviations["logit_scale"] = 1.0
    deviations["bias"] = 0.1 if is_norm else 0.02
    return np.float32(deviations[kind]) * normal


def digest(params: Arrays) -> str:
    """SHA-256 over names, shapes and values."""
    sha = hashlib.sha256()
    for key in sorted(params):
        sha.update(f"{key} {params[key].shape}\n".encode())
        sha.update(np.ascontiguousarray(params[key], "<f4").tobytes())
    return sha.hexdigest()


def make_images(seed: int, n: int, size: int) -> np.ndarray:
    """Images (n, size, size, 3) float32 in [-1, 1]: 8x8 blocks of colour, and noise."""
    sequence = np.random.SeedSequence([seed, 0x1A6E, n, size])
    rng = np.random.Generator(np.random.PCG64(sequence))
    blocks, noise = (
        rng.random((n, side, side, 3), np.float32) * np.float32(2) - np.float32(1)
        for side in (8, size)
    )
    blocks = blocks.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    return np.float32(0.7) * blocks + np.float32(0.3) * noise


def forward(params: Arrays, images: np.ndarray, *, classifier: str) -> np.ndarray:
    """The Vision Transformer written down from the paper's equations, in float64.

    Takes flat arrays under today's names and returns what the network's last layer gives.
    """
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    images = np.asarray(images, np.float64)
    if "conv_root/kernel" in p:
        images = _resnet(p, images)
    x, (rows, columns) = _patches(p, "embedding", images)
    positions = p.get("Transformer/posembed_input/pos_embedding")
    if positions is None:
        positions = np.zeros((1, rows * columns + ("cls" in p), x.shape[-1]))
        positions[0, -rows * columns :] = sincos_positions(rows, columns, x.shape[-1])
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], len(x), axis=0), x], axis=1)
    x = x + positions
    block = 0
    while f"Transformer/encoderblock_{block}/LayerNorm_0/scale" in p:
        x = _block(p, f"Transformer/encoderblock_{block}", x)
        block += 1
    x = _layer_norm(p, "Transformer/encoder_norm", x)
    if classifier in ("token", "first"):
        x = x[:, 0]
    elif classifier == "gap":
        x = x.sum(axis=1) / x.shape[1]
    elif classifier == "map":
        x = _attention_pooling(p, x)
    if "pre_logits/kernel" in p:
        x = np.tanh(_dense(p, "pre_logits", x))
    return _dense(p, "head", x) if "head/kernel" in p else x


def _block(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    y = _layer_norm(p, f"{name}/LayerNorm_0", x)
    x = x + _attention(p, f"{name}/MultiHeadDotProductAttention_0", y, y)
    return x + _mlp(p, f"{name}/MlpBlock_0", _layer_norm(p, f"{name}/LayerNorm_1", x))


def _attention(p: Arrays, name: str, asking: np.ndarray, asked: np.ndarray) -> np.ndarray:
    z = np.zeros((len(asked), asking.shape[1], asked.shape[2]))
    for head in range(p[f"{name}/query/kernel"].shape[1]):
        q, k, v = (
            y @ p[f"{name}/{part}/kernel"][:, head] + p[f"{name}/{part}/bias"][head]
            for part, y in (("query", asking), ("key", asked), ("value", asked))
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        z += scores / scores.sum(axis=-1, keepdims=True) @ v @ p[f"{name}/out/kernel"][head]
    return z + p[f"{name}/out/bias"]


def _attention_pooling(p: Arrays, x: np.ndarray) -> np.ndarray:
    """What one learned token, the same for all images, makes of theirs. (n, t, d) -> (n, d)."""
    y = _attention(p, "MAPHead_0/MultiHeadDotProductAttention_0", p["MAPHead_0/probe"], x)[:, 0]
    return y + _mlp(p, "MAPHead_0/MlpBlock_0", _layer_norm(p, "MAPHead_0/LayerNorm_0", y))


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """The fixed position embeddings number by number, (rows * columns, width)."""
    quarter = width // 4
    found = np.zeros((rows, columns, width))
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                frequency = 10_000 ** (-i / (quarter - 1))
                waves = [f(place * frequency) for place in (x, y) for f in (math.sin, math.cos)]
                found[y, x, i::quarter] = waves
    return found.reshape(rows * columns, width)


def mixer_forward(params: Arrays, images: np.ndarray) -> np.ndarray:
    """MLP-Mixer written down from its equations, in float64; as `forward`."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    images = np.asarray(images, np.float64)
    ph, pw, *_ = p["stem/kernel"].shape
    x, _ = _patches(p, "stem", _pad_same(images, (ph, pw), (ph, pw), 0.0))
    block = 0
    while (name := f"MixerBlock_{block}") + "/LayerNorm_0/scale" in p:
        y = _layer_norm(p, f"{name}/LayerNorm_0", x).swapaxes(1, 2)
        x = x + _mlp(p, f"{name}/token_mixing", y).swapaxes(1, 2)
        x = x + _mlp(p, f"{name}/channel_mixing", _layer_norm(p, f"{name}/LayerNorm_1", x))
        block += 1
    x = _layer_norm(p, "pre_head_layer_norm", x)
    x = x.sum(axis=1) / x.shape[1]
    return _dense(p, "head", x) if "head/kernel" in p else x


def _patches(p: Arrays, name: str, images: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """(n, h, w, c) -> (n, rows * columns, d) and (rows, columns); what fills no patch is cut."""
    kernel = p[f"{name}/kernel"]
    ph, pw, c, d = kernel.shape
    n, h, w, _ = images.shape
    rows, columns = h // ph, w // pw
    x = np.zeros((n, rows * columns, d))
    for row in range(rows):
        for column in range(columns):
            patch = images[:, row * ph : (row + 1) * ph, column * pw : (column + 1) * pw]
            x[:, row * columns + column] = patch.reshape(n, -1) @ kernel.reshape(ph * pw * c, d)
    return x + p[f"{name}/bias"], (rows, columns)


def _resnet(p: Arrays, x: np.ndarray) -> np.ndarray:
    """A root, and as many stages and units as there are arrays of."""
    x = np.maximum(_group_norm(p, "gn_root", _std_conv(p, "conv_root", x, 2)), 0)
    padded = _pad_same(x, (3, 3), (2, 2), -np.inf)
    x = np.max([tap for _, tap in _taps(padded, (3, 3), 2)], axis=0)
    stage = 1
    while f"block{stage}/unit1/conv1/kernel" in p:
        unit = 1
        while (name := f"block{stage}/unit{unit}") + "/conv1/kernel" in p:
            x = _bottleneck(p, name, x, stride=2 if stage > 1 and unit == 1 else 1)
            unit += 1
        stage += 1
    return x


def _bottleneck(p: Arrays, name: str, x: np.ndarray, stride: int) -> np.ndarray:
    y = np.maximum(_group_norm(p, f"{name}/gn1", _std_conv(p, f"{name}/conv1", x, 1)), 0)
    y = np.maximum(_group_norm(p, f"{name}/gn2", _std_conv(p, f"{name}/conv2", y, stride)), 0)
    y = _group_norm(p, f"{name}/gn3", _std_conv(p, f"{name}/conv3", y, 1))
    if f"{name}/conv_proj/kernel" in p:
        x = _group_norm(p, f"{name}/gn_proj", _std_conv(p, f"{name}/conv_proj", x, stride))
    return np.maximum(x + y, 0)


def _std_conv(p: Arrays, name: str, x: np.ndarray, stride: int) -> np.ndarray:
    kernel = p[f"{name}/kernel"]
    flat = kernel.reshape(-1, kernel.shape[-1])
    flat = (flat - flat.mean(axis=0)) / (flat.std(axis=0) + STANDARDISATION_EPSILON)
    kernel = flat.reshape(kernel.shape)
    size = kernel.shape[:2]
    padded = _pad_same(x, size, (stride, stride), 0.0)
    return sum(tap @ kernel[place] for place, tap in _taps(padded, size, stride))


def _taps(x: np.ndarray, size: tuple[int, int], stride: int):
    """What each element of a sliding window sees: (its place, (n, rows, columns, c))."""
    rows, columns = (
        (length - window) // stride + 1 for length, window in zip(x.shape[1:3], size, strict=True)
    )
    for i, j in np.ndindex(*size):
        yield (i, j), x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]


def _pad_same(
    x: np.ndarray, size: tuple[int, int], stride: tuple[int, int], value: float
) -> np.ndarray:
    """Pads so that windows start at ceil(length / stride) places; an odd pixel goes last."""
    widths = [(0, 0)]
    for length, window, step in zip(x.shape[1:3], size, stride, strict=True):
        total = max((math.ceil(length / step) - 1) * step + window - length, 0)
        widths.append((total // 2, total - total // 2))
    return np.pad(x, [*widths, (0, 0)], constant_values=value)


def _group_norm(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    n, h, w, c = x.shape
    groups = x.reshape(n, h * w, 32, c // 32)
    mean, variance = (f(axis=(1, 3), keepdims=True) for f in (groups.mean, groups.var))
    x = ((groups - mean) / np.sqrt(variance + NORM_EPSILON)).reshape(x.shape)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def _mlp(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    y = _dense(p, f"{name}/Dense_0", x)
    gelu = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return _dense(p, f"{name}/Dense_1", gelu)


def _dense(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def _layer_norm(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + NORM_EPSILON) * p[f"{name}/scale"] + p[f"{name}/bias"]
