"""The GELU against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.gelu import gelu


def formula(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def derivative(x: np.ndarray) -> np.ndarray:
    z = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return (1 + np.tanh(z)) / 2 + x / 2 * (1 - np.tanh(z) ** 2) * slope


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.004)])
def test_values_and_derivatives_are_those_of_the_formula(dtype, tolerance):
    near = np.linspace(-8, 8, 4001)
    x = jnp.asarray(np.concatenate([near, [-1e6, -50, 0, 50, 1e6]]), dtype)
    exact = np.float64(x)

    y, pull = jax.jit(lambda x: jax.vjp(gelu, x))(x)
    (slope,) = pull(jnp.full_like(x, 3))

    assert y.dtype == slope.dtype == dtype
    np.testing.assert_allclose(np.float64(y), formula(exact), tolerance, tolerance)
    np.testing.assert_allclose(np.float64(slope) / 3, derivative(exact), tolerance, tolerance)


def test_derivatives_of_the_derivative():
    x = jnp.linspace(-3, 3, 7)

    found = jax.vmap(jax.hessian(gelu))(x)

    step = 1e-4
    around = (derivative(np.float64(x) + side) for side in (step, -step))
    np.testing.assert_allclose(found, np.subtract(*around) / (2 * step), atol=1e-5)
