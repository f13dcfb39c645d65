"""The network opened up: what its parts say of an image."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import ImageModel, Spec
from vit_jax.pretrained import Pretrained


class Tower(NamedTuple):
    """A network that attends, of LiT weights the image tower, and its weights."""

    model: ImageModel
    params: Any
    spec: Spec

    @property
    def first_patch(self) -> int:
        """Where the patches start among the tokens."""
        return self.model.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """The (rows, columns) of the tokens that attend: the patches, or those of a last stage."""
        return self.model.attended_grid(self.spec.image_size)


class Seen(NamedTuple):
    """What the network makes of one image, float32; t tokens, the class token first.

    Attributes:
      answer: (k,) logits, without a head its input.
      attention: (blocks, heads, t, t), a row for each token that asks; rows sum to 1, of a
        Swin to less where windows are padded.
      pooling: (heads, t), how attention pooling weighs the tokens; None without it.
      blocks: (blocks, t, d), the output of each block.
      tokens: (t, d), the output of the encoder.
      further: see `ImageModel.further_maps`.
    """

    answer: Any
    attention: Any
    pooling: Any
    blocks: Any
    tokens: Any
    further: Any


def open_tower(vit: Pretrained) -> Tower:
    """The Vision Transformer in loaded weights, or another network that has attention.

    Whatever attention was computed with in training, here it is the one that shows its weights.

    Raises UserError if there is none.
    """
    spec, params = vit.spec.image_tower(), vit.spec.image_params(vit.params)
    if not spec.shows_attention:
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
def _observe(model: ImageModel, params: Any, pixels: jax.Array) -> Seen:
    (answer, features), state = model.apply(
        {"params": params}, pixels[None], return_features=True, mutable=["intermediates"]
    )
    attention, pooling = model.attention_weights(state["intermediates"])
    blocks, tokens = model.block_outputs(features), features[model.final_norm][0]
    further = model.further_maps(state["intermediates"])
    seen = Seen(answer[0], attention, pooling, blocks, tokens, further)
    return jax.tree.map(lambda x: x.astype(jnp.float32), seen)


def reading(tower: Tower, seen: Seen) -> np.ndarray:
    """float32 (t,): how much of each token the head reads; sums to 1.

    That is the mean of attention pooling's heads, or what `ImageModel.head_reads` says.
    """
    if seen.pooling is not None:
        return seen.pooling.mean(axis=0)
    weights = np.zeros(len(seen.tokens), np.float32)
    for part in tower.model.head_reads:
        weights[part] = 1 / len(weights[part]) / len(tower.model.head_reads)
    return weights


def on_grid(tower: Tower, values: np.ndarray) -> np.ndarray:
    """Values of tokens (..., t) as a map of the patches (..., rows, columns)."""
    patches = values[..., tower.first_patch :]
    return patches.reshape(*values.shape[:-1], *tower.grid)
