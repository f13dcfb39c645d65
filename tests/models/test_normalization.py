"""LayerNorm against float64 and against Flax, whose module the published checkpoints are of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.normalization import LayerNorm


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_derivatives_are_those_of_flax(dtype):
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((2, 3, 8)).astype(np.float32) for _ in range(2))
    params = {
        "params": {
            "scale": rng.uniform(0.5, 2, 8).astype(np.float32),
            "bias": rng.standard_normal(8).astype(np.float32),
        }
    }
    x = jnp.asarray(x, dtype)

    def value_and_grad(module):
        def value(params, x):
            y = module.apply(params, x)
            assert y.dtype == dtype
            return (y * weights).sum()

        return jax.value_and_grad(value, (0, 1))(params, x)

    ours = value_and_grad(LayerNorm(1e-6, dtype))
    theirs = value_and_grad(nn.LayerNorm(1e-6, dtype=dtype))

    tolerance = 1e-5 if dtype == jnp.float32 else 0.05

    def compare(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), tolerance, tolerance)

    jax.tree.map(compare, ours, theirs)


def test_the_derivative_is_the_limit_of_differences():
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((2, 8)), rng.standard_normal((2, 8))
    scale, bias = rng.standard_normal(8), rng.standard_normal(8)

    def value(x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return ((y * scale + bias) * weights).sum()

    step = 1e-5 * np.eye(16).reshape(16, 2, 8)
    expected = [(value(x + dx) - value(x - dx)) / 2e-5 for dx in step]

    params = {"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}
    found = jax.grad(lambda x: (LayerNorm(1e-6).apply(params, x) * weights).sum())(jnp.float32(x))

    np.testing.assert_allclose(found.reshape(-1), expected, atol=1e-5)
