"""Weights in the plain tree of the original's code: what other networks have beside it is
multiplied into the arrays that it has, so that the same is computed."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.checkpoints.torch import POSITIONS
from vit_jax.errors import UserError
from vit_jax.models import Spec, VisionTransformer
from vit_jax.models.layers import ATTENTION_NAME, LAYER_NORM_EPSILON
from vit_jax.models.positions import sincos_positions

# The nearest that the original's code or a library computes, where nothing gives the same.
_NEAREST: dict[str | None, dict[str, Any]] = {
    None: {"activation": "gelu_tanh", "layer_norm_epsilon": LAYER_NORM_EPSILON},
    "timm": {"layer_norm_epsilon": LAYER_NORM_EPSILON},
    "hf": {},
}

Arrays = dict[str, np.ndarray]


class Folded(NamedTuple):
    """Other weights of the same network; `done` says what was folded, one phrase a change."""

    arrays: Arrays
    spec: Spec
    preprocess: str
    done: tuple[str, ...]


def fold(arrays: Mapping[str, np.ndarray], spec: Spec, preprocess: str) -> Folded:
    """Folds whatever can be folded exactly, but for rounding.

    - LayerScale into the last layers of attention and MLPs;
    - mean and deviation of the images' values into the patches' filters, so that images of
      value_range(-1, 1) give the same;
    - missing biases of queries, keys and values, and missing positions, as zeros; fixed positions
      as learned ones;
    - another epsilon: LayerNorm(c x) with c^2 epsilon is LayerNorm(x) with epsilon, so tokens
      become c times as large. Attention pooling adds to what a LayerNorm gave: there it stays.

    Args:
      arrays, spec: a Vision Transformer, under today's names.
      preprocess: how its images are made ready.

    Raises UserError for another network, and for mean and deviation before a ResNet.
    """
    from vit_jax.data import parse  # Slow to import.

    if not isinstance(spec.module, VisionTransformer):
        raise UserError(f"a {spec.kind} can't be folded, only a ViT: leave --fold out")
    new, done = dict(arrays), []
    changes: dict[str, Any] = {"cls_has_position": True}
    blocks = [f"Transformer/encoderblock_{i}" for i in range(spec.num_layers)]
    last_dense = "Dense_2" if spec.mlp == "swiglu" else "Dense_1"
    ends = (f"{ATTENTION_NAME}/out", f"MlpBlock_0/{last_dense}")
    tokens = spec.num_prefix_tokens - spec.num_registers

    def multiply(key: str, factor: np.ndarray | float) -> None:
        new[key] = (new[key] * np.float64(factor)).astype(np.float32)

    if spec.layer_scale is not None:
        for block in blocks:
            for i, end in enumerate(ends):
                scale = new.pop(f"{block}/LayerScale_{i}/scale")
                for part in ("kernel", "bias"):
                    multiply(f"{block}/{end}/{part}", scale)
        changes["layer_scale"] = None
        done.append("LayerScale")
    if not spec.qkv_bias:
        for block in blocks:
            for name in ("query", "key", "value"):
                shape = new[f"{block}/{ATTENTION_NAME}/{name}/kernel"].shape[1:]
                new[f"{block}/{ATTENTION_NAME}/{name}/bias"] = np.zeros(shape, np.float32)
        changes["qkv_bias"] = True
        done.append("zeros for the biases of queries, keys and values")
    if spec.position_embedding != "learned":
        fixed = np.asarray(sincos_positions(spec.grid_size, spec.hidden_size))
        new[POSITIONS] = np.pad(fixed, ((0, 0), (tokens, 0), (0, 0)))
        changes["position_embedding"] = "learned"
        done.append("fixed positions")
    elif not spec.cls_has_position and tokens:
        new[POSITIONS] = np.pad(new[POSITIONS], ((0, 0), (tokens, 0), (0, 0)))
        done.append("zeros for the position of the class token")

    parsed = parse(preprocess)
    values = parsed.range
    if np.any(np.subtract(values.scale, 1)) or np.any(values.offset):
        if spec.resnet is not None:
            raise UserError(
                f"images with values of {values} can't be folded into a ResNet, which pads with "
                "zeros and standardises its filters: leave --fold out"
            )
        if not parsed.normalize:
            raise UserError(
                f"the preprocessing {preprocess!r} doesn't end with mean and deviation, or a range "
                "of values, which is what would be folded: leave --fold out"
            )
        kernel = new["embedding/kernel"].astype(np.float64)
        scale, offset = (np.reshape(x, (-1, 1)) for x in (values.scale, values.offset))
        new["embedding/kernel"] = (kernel * scale).astype(np.float32)
        bias = new["embedding/bias"] + (kernel * offset).sum(axis=(0, 1, 2))
        new["embedding/bias"] = bias.astype(np.float32)
        rest = parsed.without_normalize().spec
        preprocess = f"{rest}|value_range(-1, 1)".removeprefix("|")
        done.append(f"values of images of {values}, which now are -1 to 1")

    epsilon = spec.layer_norm_epsilon
    if epsilon != LAYER_NORM_EPSILON and spec.classifier != "map":
        factor = math.sqrt(LAYER_NORM_EPSILON / epsilon)
        into = ["cls", "dist", "registers", POSITIONS]
        layers = ["embedding", *(f"{block}/{end}" for block in blocks for end in ends)]
        into += [f"{layer}/{part}" for layer in layers for part in ("kernel", "bias")]
        for key in filter(new.__contains__, into):
            multiply(key, factor)
        changes["layer_norm_epsilon"] = LAYER_NORM_EPSILON
        done.append(f"LayerNorm's epsilon {epsilon:g}, by tokens {factor:g} times as large")
    return Folded(new, spec.replace(**changes), preprocess, tuple(done))


def approximated(spec: Spec, library: str | None) -> tuple[Spec, dict[str, Any]]:
    """The nearest network that a library, or with None the original's code, computes.

    Returns:
      (spec, what was replaced): the network's own values of the fields that are others now.
    """
    nearest = {k: v for k, v in _NEAREST[library].items() if getattr(spec, k) != v}
    if spec.mlp == "swiglu":  # It has no other activation.
        nearest.pop("activation", None)
    return spec.replace(**nearest), {name: getattr(spec, name) for name in nearest}


def check_original(spec: Spec) -> None:
    """Raises UserError with what of a folded Vision Transformer the original's code has not."""
    is_other = {
        "SwiGLU": spec.mlp != "gelu",
        f"{spec.num_registers} registers": spec.num_registers > 0,
        "a distillation token": spec.distilled != "none",
        "a class token that the head doesn't read": spec.unread_class_token,
        "a LayerNorm behind the mean": spec.fc_norm,
        f"classifier {spec.classifier!r}": spec.classifier in ("map", "first", "token_gap"),
    }
    left = [name for name, is_so in is_other.items() if is_so]
    near, replaced = approximated(spec, None)
    if left:
        raise UserError(
            f"the original's code doesn't have {' nor '.join(left)}, and nothing there gives the "
            "same: leave --fold out"
        )
    if replaced:
        theirs = [f"{k} {v!r}, only {getattr(near, k)!r}" for k, v in replaced.items()]
        raise UserError(
            f"the original's code doesn't have {' nor '.join(theirs)}: say --approximate to take "
            "that, and see how much the logits change"
        )
