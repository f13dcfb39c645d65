"""Attention: its numbers, what it lets one see, and dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.layers import MultiHeadAttention


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_numbers_are_those_of_flax(dtype):
    """Of whose module the published checkpoints are."""
    x, asked = tokens(2, 3, 12), tokens(2, 5, 12, seed=1)
    kernel_init = nn.initializers.xavier_uniform()
    flax = nn.MultiHeadDotProductAttention(3, dtype=dtype, kernel_init=kernel_init)

    expected, theirs = flax.init_with_output(jax.random.key(0), x, asked)
    found, ours = MultiHeadAttention(3, dtype=dtype).init_with_output(jax.random.key(0), x, asked)

    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(
        np.float32(found), np.float32(expected), atol=tolerance, rtol=tolerance
    )


def test_weights_can_be_seen_and_derived_by():
    """The derivative by one weight is what the output changes by, if that weight is changed."""
    model, x = MultiHeadAttention(2), tokens(1, 3, 4)
    params = {"params": model.init(jax.random.key(0), x, x)["params"]}

    seen, sown = model.apply(params, x, x, mutable=["intermediates"])
    _, zeros = model.apply(params, x, x, mutable=["perturbations"])
    gradient = jax.grad(lambda changes: model.apply(params | changes, x, x)[0, 1, 2])(zeros)
    changed = jax.tree.map(lambda a: a.at[0, 1, 1, 2].add(1.0), zeros)

    np.testing.assert_array_equal(seen, model.apply(params, x, x))
    (weights,) = sown["intermediates"]["attention_weights"]
    assert weights.shape == (1, 2, 3, 3)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        gradient["perturbations"]["attention_weights"][0, 1, 1, 2],
        (model.apply(params | changed, x, x) - seen)[0, 1, 2],
        rtol=1e-5,
    )


def test_dropout_draws_each_weight_on_its_own():
    """Of tokens that are all alike no two keep the same share."""
    x = np.ones((4, 8, 6), np.float32)
    model = MultiHeadAttention(2, dropout_rate=0.5)
    params = model.init(jax.random.key(0), x, x)

    kept = model.apply(params, x, x, deterministic=False, rngs={"dropout": jax.random.key(1)})

    assert len(np.unique(np.round(kept[..., 0], 4))) > 16  # Of 32, some by chance the same.
