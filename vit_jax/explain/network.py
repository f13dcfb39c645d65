"""The network opened up: what its parts say of an image."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.spec import LiTSpec, Spec
from vit_jax.errors import UserError
from vit_jax.models import VisionTransformer
from vit_jax.models.attention import ATTENTION_NAME
from vit_jax.pretrained import Pretrained


class Tower(NamedTuple):
    """A Vision Transformer, of LiT weights the image tower, and its weights."""

    model: VisionTransformer
    params: Any
    spec: Spec

    @property
    def first_patch(self) -> int:
        """Where the patches start among the tokens."""
        return int(self.model.has_class_token)


class Seen(NamedTuple):
    """What the network makes of one image, float32; t tokens, the class token first.

    Attributes:
      answer: (k,) logits, without a head its input.
      attention: (blocks, heads, t, t), a row for each token that asks; rows sum to 1.
      pooling: (heads, t), how attention pooling weighs the tokens; None without it.
      blocks: (blocks, t, d), the output of each block.
      tokens: (t, d), the output of the encoder.
    """

    answer: Any
    attention: Any
    pooling: Any
    blocks: Any
    tokens: Any


def open_tower(vit: Pretrained) -> Tower:
    """The Vision Transformer in loaded weights.

    Whatever attention was computed with in training, here it is the one that shows its weights.

    Raises UserError if there is none.
    """
    spec, params = vit.spec, vit.params
    if isinstance(spec, LiTSpec):
        spec, params = spec.image, params["img"]
    if not isinstance(spec, Spec):
        raise UserError(
            f"{spec.description} is a {spec.kind}, which has no attention to look at: "
            "explain a Vision Transformer"
        )
    return Tower(spec.model(dtype=vit.model.dtype), jax.device_put(params), spec)


def observe(tower: Tower, pixels: np.ndarray) -> Seen:
    """Runs the network on one preprocessed image, float32 (h, w, c).

    Raises UserError if the image hasn't the network's size.
    """
    expected = (*tower.spec.image_size, tower.spec.channels)
    if pixels.shape != expected:
        raise UserError(
            f"an image has shape {pixels.shape} after preprocessing, expected {expected}: "
            "preprocess it, or load the weights with image_size=(h, w)"
        )
    return Seen(*jax.device_get(_observe(tower.model, tower.params, pixels)))


@functools.partial(jax.jit, static_argnums=0)
def _observe(model: VisionTransformer, params: Any, pixels: jax.Array) -> Seen:
    (answer, features), state = model.apply(
        {"params": params}, pixels[None], return_features=True, mutable=["intermediates"]
    )
    attention, pooling = stacked_weights(model, state["intermediates"])
    blocks = jnp.concatenate([features[f"encoderblock_{i}"] for i in range(model.num_layers)])
    seen = Seen(answer[0], attention, pooling, blocks, features["encoder_norm"][0])
    return jax.tree.map(lambda x: x.astype(jnp.float32), seen)


def stacked_weights(
    model: VisionTransformer, collection: Any
) -> tuple[jax.Array, jax.Array | None]:
    """((blocks, heads, t, t), (heads, t) or None): attention of the blocks and of the pooling.

    Args:
      model: the network.
      collection: "intermediates" or "perturbations" of one image.
    """

    def of(module: Any) -> jax.Array:
        weights = module[ATTENTION_NAME]["attention_weights"]
        return weights[0][0] if isinstance(weights, tuple) else weights[0]  # Sown, or perturbed.

    blocks = (collection["Transformer"][f"encoderblock_{i}"] for i in range(model.num_layers))
    pooling = of(collection["MAPHead_0"])[:, 0] if model.classifier == "map" else None
    return jnp.stack([of(block) for block in blocks]), pooling


def reading(tower: Tower, seen: Seen) -> np.ndarray:
    """float32 (t,): how much of each token the head reads; sums to 1.

    That is the class token, the mean of attention pooling's heads, or all tokens alike.
    """
    if tower.model.has_class_token:
        return np.eye(1, len(seen.tokens), dtype=np.float32)[0]
    if seen.pooling is not None:
        return seen.pooling.mean(axis=0)
    return np.full(len(seen.tokens), 1 / len(seen.tokens), np.float32)


def on_grid(tower: Tower, values: np.ndarray) -> np.ndarray:
    """Values of tokens (..., t) as a map of the patches (..., rows, columns)."""
    patches = values[..., tower.first_patch :]
    return patches.reshape(*values.shape[:-1], *tower.spec.grid_size)
