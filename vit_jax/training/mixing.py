"""Mixup and CutMix: batches whose images are made of two, inside the compiled step."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

# Sets these random numbers apart from the dropout's, which come from the same key.
_STREAM = 0x6D6978


def mix(
    batch: Mapping[str, jax.Array], key: jax.Array, classes: int, *, mixup: float, cutmix: float
) -> dict[str, jax.Array]:
    """Mixes each image with the one before it in the batch, the first with the last.

    All images of a batch are mixed alike, with one share a of their own, b ~ Beta(p, p):

    - mixup, p = `mixup`: a * own + (1 - a) * other, a = max(b, 1 - b). Source: Zhang et al. 2018
      (arXiv:1710.09412); the one share a batch of at least a half, and the partner, are
      big_vision's, whose AugReg settings are for these.
    - CutMix, p = `cutmix`: a rectangle of the other covers sqrt(1 - b) of the height and of the
      width; its centre is anywhere, so that it may be cut at an edge. a is what is left of the own.
      Source: Yun et al. 2019 (arXiv:1905.04899).

    Args:
      batch: "image" (n, h, w, c), float32 or uint8, and "label" int (n,) or float (n, classes).
      key: decides everything, so that a batch is mixed the same on any number of devices.
      mixup, cutmix: 0 for none. With both, each does half of the batches.

    Returns:
      "image" float32 as before and "label" float32 (n, classes): a * own + (1 - a) * other's.
    """
    images, labels = batch["image"], batch["label"]
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, classes)
    weights, share = _weights(jax.random.fold_in(key, _STREAM), images.shape[1:3], mixup, cutmix)
    return {
        "image": weights * images + (1 - weights) * jnp.roll(images, 1, axis=0),
        "label": share * labels + (1 - share) * jnp.roll(labels, 1, axis=0),
    }


def _weights(
    key: jax.Array, size: tuple[int, ...], mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """The weight of the own image at each pixel, (h, w, 1), and on the whole, a scalar."""
    choose, draw, centre = jax.random.split(key, 3)
    weights, shares = [], []
    if mixup:
        beta = jax.random.beta(draw, mixup, mixup)
        shares.append(jnp.maximum(beta, 1 - beta))
        weights.append(jnp.full((*size, 1), shares[-1]))
    if cutmix:
        half = jnp.sqrt(1 - jax.random.beta(draw, cutmix, cutmix)) / 2
        inside = []
        for length, middle in zip(size, jax.random.uniform(centre, (2,)), strict=True):
            pixels = jnp.arange(length)
            low, high = (jnp.round((middle + side) * length) for side in (-half, half))
            inside.append((pixels >= low) & (pixels < high))
        own = ~(inside[0][:, None] & inside[1][None, :])
        weights.append(own[..., None].astype(jnp.float32))
        shares.append(own.mean())
    if len(weights) == 1:
        return weights[0], shares[0]
    first = jax.random.bernoulli(choose)
    return jnp.where(first, weights[0], weights[1]), jnp.where(first, shares[0], shares[1])


def mix_images(
    images: np.ndarray, step: int, *, seed: int, mixup: float
) -> tuple[np.ndarray, float]:
    """A batch of images mixed as at a step of training, and the share of each that is its own."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(2)}
    mixed = mix(batch, key, 2, mixup=mixup, cutmix=0.0)
    return np.asarray(mixed["image"]), float(mixed["label"][0, 0])
