"""Dense layers against Flax, of whose module the published checkpoints are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.dense import Dense


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (0, 3, 6)])
@pytest.mark.parametrize("features", [3, 6, 12])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_values_and_derivatives_are_those_of_flax(shape, features, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    theirs = nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform())
    ours = Dense(features, dtype)
    variables = theirs.init(jax.random.key(0), x)

    def value_and_grad(module):
        def value(variables, x):
            y = module.apply(variables, x)
            return jnp.square(y.astype(jnp.float32)).sum(), y

        return jax.jit(jax.grad(value, (0, 1), has_aux=True))(variables, x)

    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), variables)
    expected, found = value_and_grad(theirs), value_and_grad(ours)

    tolerance = 1e-5 if dtype == jnp.float32 else 0.03

    def compare(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), tolerance, tolerance)

    jax.tree.map(compare, found, expected)


def test_parameters_may_be_kept_in_other_shapes():
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    split = Dense(4, kernel_shape=(6, 2, 2), bias_shape=(2, 2))

    y, variables = split.init_with_output(jax.random.key(0), x)

    assert variables["params"]["kernel"].shape == (6, 2, 2)
    assert variables["params"]["bias"].shape == (2, 2)
    expected, plain = Dense(4).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(
        variables["params"]["kernel"].reshape(6, 4), plain["params"]["kernel"]
    )
    np.testing.assert_array_equal(y, expected)
