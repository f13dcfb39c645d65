"""Networks with seeded numbers in place of initial ones, compiled as a whole."""

import functools

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import reference


def key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="rbg")  # Several times faster to compile than the default.


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def shapes_of(model: nn.Module, *inputs) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(model.init, key(0), *inputs)["params"]
    return {k: leaf.shape for k, leaf in flatten_dict(params, sep="/").items()}


def arrays_of(model: nn.Module, images: np.ndarray, seed: int = 0, **kwargs):
    return reference.make_params(shapes_of(model, images), seed, **kwargs)


def apply(model: nn.Module, arrays, images: np.ndarray, seed: int = 0, **kwargs):
    """`model.apply`, compiled as a whole, with a seed for dropout."""
    with jax.default_matmul_precision("highest"):
        return _compiled(model, **kwargs)(unflatten_dict(arrays, sep="/"), images, key(seed))


@functools.cache
def _compiled(model: nn.Module, **kwargs):
    return jax.jit(
        lambda params, x, rng: model.apply({"params": params}, x, rngs={"dropout": rng}, **kwargs)
    )


def feature_shapes(model: nn.Module, images: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The shapes of the intermediate features."""
    _, features = jax.eval_shape(
        lambda x: model.init_with_output(key(0), x, return_features=True)[0], images
    )
    return {name: leaf.shape for name, leaf in features.items()}
