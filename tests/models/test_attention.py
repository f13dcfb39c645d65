"""Attention: its numbers, what it lets one see, and dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vit_jax.models.attention import MultiHeadAttention, attend, attention_weights


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_weights_are_the_papers():
    query, key = tokens(2, 3, 5, 4), 3 * tokens(2, 3, 7, 4, seed=1)

    found = attention_weights(query, key)

    scores = np.float64(query) @ np.float64(key).swapaxes(2, 3) / 4**0.5
    expected = np.exp(scores) / np.exp(scores).sum(axis=3, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_nobody_attends_to_what_is_masked():
    mask = np.array([True, False, True])

    found = attention_weights(tokens(1, 2, 3, 4), tokens(1, 2, 3, 4, seed=1), mask)

    assert np.all((np.asarray(found) > 0) == mask)
    np.testing.assert_allclose(np.sum(found, axis=-1), 1, rtol=1e-6)


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


@pytest.mark.parametrize("pictures", [1, 3, 4, 8])
def test_attention_and_its_derivative_are_those_of_the_formula(pictures):
    """Against float64 NumPy, with scores of up to some hundreds, which exp alone can't take."""
    rng = np.random.default_rng(pictures)
    q, k, v, g = (rng.normal(size=(pictures, 2, t, 4)) for t in (5, 3, 3, 5))
    q[0] *= 200
    scores = np.einsum("nhtw,nhsw->nhts", q, k) / 2
    weights = scipy.special.softmax(scores, axis=-1)
    by_weights = np.einsum("nhtw,nhsw->nhts", g, v)
    by_scores = weights * (by_weights - (weights * by_weights).sum(axis=-1, keepdims=True)) / 2
    expected = (
        np.einsum("nhts,nhsw->nhtw", by_scores, k),
        np.einsum("nhts,nhtw->nhsw", by_scores, q),
        np.einsum("nhts,nhtw->nhsw", weights, g),
    )

    y, derivative = jax.vjp(attend, *(x.astype(np.float32) for x in (q, k, v)))

    np.testing.assert_allclose(y, np.einsum("nhts,nhsw->nhtw", weights, v), atol=1e-5)
    for found, wanted in zip(derivative(g.astype(np.float32)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 8])
def test_the_derivative_in_bfloat16_is_near_that_in_float32(offset):
    """Also if keys and values have much in common, which has no effect on queries and keys."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(1, 4, 50, 16)) + shift, jnp.bfloat16)
        for shift in (0, offset, offset, 0)
    )

    def derivative(*arrays):
        *inputs, grad = arrays
        return jax.jit(lambda *x: jax.vjp(attend, *x)[1](grad))(*inputs)

    expected = derivative(*(x.astype(jnp.float32) for x in (q, k, v, g)))
    for found, wanted in zip(derivative(q, k, v, g), expected, strict=True):
        error = np.linalg.norm(np.float32(found) - wanted) / np.linalg.norm(wanted)
        assert found.dtype == jnp.bfloat16
        assert error < 0.03


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
