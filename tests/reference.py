"""Independent references: seeded weights and pictures, and the network in float64 NumPy.

The generator follows a rule, so that files of any official shape can be made anywhere and numbers
that the original code computed from them (tests/official) can be compared. Every array has a stream
of its own, PCG64 seeded with (seed, CRC-32 of its name): its values don't depend on the others.
"""

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

OFFICIAL = Path(__file__).parent / "official"

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]


@functools.cache
def facts(name: str):
    """A file of tests/official: "manifests", "fwd" or "interp"."""
    return json.loads((OFFICIAL / f"{name}.json").read_text())


def official_shapes(name: str, head: str = "1000", size: int = 224) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official model, as the original code makes them.

    `head` is a number of classes or "none", with "+rep" if there is a pre_logits layer.
    """
    manifest = facts("manifests")[name]
    shapes = dict(manifest["outside"]) | manifest["heads"][head]
    for i in range(manifest["num_layers"]):
        for key, shape in manifest["block"].items():
            shapes[f"Transformer/encoderblock_{i}/{key}"] = shape
    shapes["Transformer/posembed_input/pos_embedding"] = manifest["positions"][str(size)]
    return {key: tuple(shape) for key, shape in shapes.items()}


def make_params(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Random float32 arrays {name: array} of a size that keeps activations near 1."""
    return {key: _array(key, shapes[key], seed) for key in sorted(shapes)}


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
    is_norm = owner.startswith("LayerNorm_") or owner == "encoder_norm"
    deviation = {"bias": 0.1 if is_norm else 0.02, "pos_embedding": 0.2, "cls": 0.5}[kind]
    return np.float32(deviation) * normal


def digest(params: Arrays) -> str:
    """SHA-256 over names, shapes and values."""
    sha = hashlib.sha256()
    for key in sorted(params):
        sha.update(f"{key} {params[key].shape}\n".encode())
        sha.update(np.ascontiguousarray(params[key], "<f4").tobytes())
    return sha.hexdigest()


def make_images(seed: int, n: int, size: int) -> np.ndarray:
    """Pictures (n, size, size, 3) float32 in [-1, 1]: 8x8 blocks of colour, and noise."""
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
    kernel = p["embedding/kernel"]
    ph, pw, _, d = kernel.shape
    n, h, w, c = images.shape
    rows, columns = h // ph, w // pw
    x = np.zeros((n, rows * columns, d))
    for row in range(rows):
        for column in range(columns):
            patch = images[:, row * ph : (row + 1) * ph, column * pw : (column + 1) * pw]
            x[:, row * columns + column] = patch.reshape(n, -1) @ kernel.reshape(ph * pw * c, d)
    x += p["embedding/bias"]
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], n, axis=0), x], axis=1)
    x = x + p["Transformer/posembed_input/pos_embedding"]
    block = 0
    while f"Transformer/encoderblock_{block}/LayerNorm_0/scale" in p:
        x = _block(p, f"Transformer/encoderblock_{block}", x)
        block += 1
    x = _layer_norm(p, "Transformer/encoder_norm", x)
    if classifier == "token":
        x = x[:, 0]
    elif classifier == "gap":
        x = x.sum(axis=1) / x.shape[1]
    if "pre_logits/kernel" in p:
        x = np.tanh(_dense(p, "pre_logits", x))
    return _dense(p, "head", x) if "head/kernel" in p else x


def _block(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    attention = f"{name}/MultiHeadDotProductAttention_0"
    y = _layer_norm(p, f"{name}/LayerNorm_0", x)
    z = np.zeros_like(x)
    for head in range(p[f"{attention}/query/kernel"].shape[1]):
        q, k, v = (
            y @ p[f"{attention}/{part}/kernel"][:, head] + p[f"{attention}/{part}/bias"][head]
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        z += scores / scores.sum(axis=-1, keepdims=True) @ v @ p[f"{attention}/out/kernel"][head]
    x = x + z + p[f"{attention}/out/bias"]
    y = _dense(p, f"{name}/MlpBlock_0/Dense_0", _layer_norm(p, f"{name}/LayerNorm_1", x))
    gelu = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + _dense(p, f"{name}/MlpBlock_0/Dense_1", gelu)


def _dense(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def _layer_norm(p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]
